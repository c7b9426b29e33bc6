"""Megatron's optimizer state, addressed by boxes of Hugging Face tensors.

Three kinds of tensors: ``master`` (only where the model's weights are narrower), ``exp_avg``, ``exp_avg_sq``.
A checkpoint holds them in float32, whatever Adam keeps moments in. A box of one of them is a tensor of a
safetensors file, named ``KIND|TENSOR|0:64,32:64``. Every element is written by one rank, and a rank of any
layout reads the boxes it needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtrl.adam import adams_of, parts_of
from mtrl.models.boxes import Box, Piece
from mtrl.models.builder import Model
from mtrl.models.flat_ranges import RangePiece, pieces_of_range
from mtrl.models.pieces import range_region
from mtrl.models.transfers import Boxes, plan_transfers
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.errors import CheckpointError

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
Parameter = tuple[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one of Megatron's optimizers on this rank keeps of one parameter: elements ``start`` to ``stop``.

    ``main`` is the float32 tensor that Adam updates, which is the weight itself where that is float32.
    """

    parameter: Parameter
    start: int
    stop: int
    main: Tensor
    is_master: bool
    optimizer: Any

    @property
    def state(self) -> dict[str, Any]:
        """torch's state of ``main``; empty before the first step."""
        found: dict[str, Any] = self.optimizer.state[self.main]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """By kind, 1-d, sharing memory with the optimizer."""
        found = {kind: self.state[kind].view(-1) for kind in MOMENTS}
        return {"master": self.main.detach().view(-1), **found} if self.is_master else found


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """All shards of this rank, and what they are of the checkpoint."""

    model: Model
    shards: tuple[Shard, ...]
    parts: tuple[tuple[RangePiece, ...], ...]

    @classmethod
    def of(cls, model: Model, optimizer: Any) -> "OptimizerState":
        """The state of a Megatron optimizer of ``model``; Adam's moments are zeros before the first step."""
        names = {id(parameter): key for key, parameter in model.parameters().items()}
        shards = tuple(_shards(optimizer, names))
        for shard in shards:
            _initialize(shard)
        pieces: dict[Parameter, list[Piece]] = {}
        for piece in model.weight_map.of_rank(model.groups.rank).pieces:
            pieces.setdefault((piece.chunk, piece.local.name), []).append(piece)
        parts = tuple(
            tuple(pieces_of_range(pieces[shard.parameter], shard.start, shard.stop)) for shard in shards
        )
        return cls(model, shards, parts)

    @property
    def num_steps(self) -> int:
        """Adam's count of steps, the same for every parameter."""
        counts = {_num_steps(shard) for shard in self.shards}
        assert len(counts) <= 1, f"parameters differ in their number of steps: {sorted(counts)}"
        return next(iter(counts), 0)

    def set_num_steps(self, count: int) -> None:
        """Set Adam's count of steps."""
        for shard in self.shards:
            if isinstance(shard.optimizer, torch.optim.Adam):
                shard.state["step"] = torch.full_like(shard.state["step"], count)
                continue
            for group in shard.optimizer.param_groups:
                group["step"] = count  # Transformer Engine's and Apex's, which a fresh one lacks

    def boxes(self) -> dict[str, list[Box]]:
        """The boxes that this rank has of each Hugging Face tensor."""
        found: dict[str, list[Box]] = {}
        for parts in self.parts:
            for part in parts:
                found.setdefault(part.piece.hf.name, []).append(part.piece.stored)
        return found

    def count_tensors(self) -> int:
        """Hugging Face tensors that have state on any rank. Collective over WORLD."""
        return len({name for names in gather_json(list(self.boxes())) for name in names})

    def owned(self) -> dict[str, Tensor]:
        """The boxes that this rank writes, by their names in the file; views where they can be.

        Together the ranks write every element once. Collective over WORLD.
        """
        rank, shapes = self.model.groups.rank, self.model.weight_map.hf_shapes()
        holders: dict[str, dict[Box, tuple[Shard, RangePiece]]] = {}
        for shard, parts in zip(self.shards, self.parts, strict=True):
            for part in parts:
                holders.setdefault(part.piece.hf.name, {})[part.piece.stored] = (shard, part)
        found: dict[str, Tensor] = {}
        for name, box in written_boxes(gather_json(_to_json(self.boxes())), shapes)[rank]:
            held = box if box in holders[name] else next(h for h in holders[name] if h.intersect(box) == box)
            shard, part = holders[name][held]
            for kind, tensor in shard.tensors().items():
                region = range_region(tensor, part).reshape(held.shape)
                found[box_name(kind, name, box)] = region[box.relative_to(held).slices].float()
        return found

    def restore(self, source: "BoxSource") -> int:
        """Fill every shard from ``source``; the number of Hugging Face tensors restored on this rank.

        Raises:
            CheckpointError: a box is not there.
        """
        for shard, parts in zip(self.shards, self.parts, strict=True):
            for kind, tensor in shard.tensors().items():
                for part in parts:
                    region = range_region(tensor, part)
                    stored = source.read(kind, part.piece.hf.name, part.piece.stored)
                    region.copy_(stored.reshape(region.shape))
        return len(self.boxes())


def _shards(optimizer: Any, names: Mapping[int, Parameter]) -> Iterator[Shard]:
    for each in parts_of(optimizer):
        owners = {
            id(main): adam
            for adam in adams_of(each)
            for group in adam.param_groups
            for main in group["params"]
        }
        for parameter, main, start, stop in _main_tensors(each):
            yield Shard(
                parameter=names[id(parameter)],
                start=start,
                stop=stop,
                main=main,
                is_master=main.dtype != parameter.dtype,
                optimizer=owners[id(main)],
            )


def _main_tensors(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """(parameter, what Adam updates, start, stop) of one of Megatron's optimizers."""
    if isinstance(optimizer, DistributedOptimizer):
        adam = optimizer.optimizer
        # Where some step on the host, each is a float32 copy of what Megatron knows.
        inner = adam.param_to_inner_param if isinstance(adam, HybridDeviceOptimizer) else {}
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            part = optimizer._get_model_param_range_map(parameter)["param"]
            main = adam.param_groups[group]["params"][order]
            yield parameter, inner.get(main, main), part.start, part.end
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        narrow = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameters, mains in narrow:
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0, parameter.numel()
        for parameters in optimizer.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, parameter, 0, parameter.numel()
    else:
        assert isinstance(optimizer, FP32Optimizer), type(optimizer)
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0, parameter.numel()


def _initialize(shard: Shard) -> None:
    state = shard.state
    dtypes = getattr(shard.optimizer, "name_to_dtype_map", {})  # Transformer Engine's
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(shard.main, dtype=dtypes.get(kind))
    # torch's Adam counts steps in each parameter's state; the fused ones in the group.
    if "step" not in state and isinstance(shard.optimizer, torch.optim.Adam):
        # The fused one counts where its tensors are.
        is_fused = any(group.get("fused") for group in shard.optimizer.param_groups)
        device = shard.main.device if is_fused else torch.device("cpu")
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device=device)


def _num_steps(shard: Shard) -> int:
    if "step" in shard.state:
        return int(shard.state["step"])
    counts = [int(group["step"]) for group in shard.optimizer.param_groups if "step" in group]
    return max(counts, default=0)


def _to_json(boxes: Mapping[str, Sequence[Box]]) -> dict[str, list[Any]]:
    return {name: [box.ranges for box in held] for name, held in boxes.items()}


def written_boxes(
    everyones: Sequence[Mapping[str, Sequence[Any]]], shapes: Mapping[str, tuple[int, ...]]
) -> list[list[tuple[str, Box]]]:
    """Which boxes each rank writes, when ``everyones[r]`` are the ranges that rank r has of each tensor.
    Pure.

    Of several ranks that have a box, the one that has fewest elements to write so far writes it.

    Raises:
        WeightError: some element of a tensor is held by no rank.
    """
    num_ranks = len(everyones)
    writes: list[list[tuple[str, Box]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, boxes in enumerate(everyones):
        for name, held in boxes.items():
            for ranges in held:
                box = Box(tuple((start, stop) for start, stop in ranges))
                holders.setdefault(name, {}).setdefault(box, []).append(rank)
    for name, ranks_of in holders.items():
        if sum(box.num_elements for box in ranks_of) == torch.Size(shapes[name]).numel():
            for box, ranks in ranks_of.items():
                rank = min(ranks, key=lambda r: (loads[r], r))
                writes[rank].append((name, box))
                loads[rank] += box.num_elements
            continue
        # Tied weights, of which shards of two stages overlap: as if one more rank, without any, needed all.
        have = [{name: tuple(box for box in ranks_of if rank in ranks_of[box])} for rank in range(num_ranks)]
        disk: Boxes = {name: (Box.full(shapes[name]),)}
        for each in plan_transfers([name], have, [*({} for _ in have), disk]).transfers:
            writes[each.source].append((name, each.box))
            loads[each.source] += each.box.num_elements
    return writes


def box_name(kind: str, name: str, box: Box) -> str:
    """A box's name in a file.

    >>> box_name("exp_avg", "lm_head.weight", Box(((0, 4), (2, 8))))
    'exp_avg|lm_head.weight|0:4,2:8'
    """
    return f"{kind}|{name}|{','.join(f'{start}:{stop}' for start, stop in box.ranges)}"


def parse_box_name(text: str) -> tuple[str, str, Box]:
    """Kind, Hugging Face name and box; ValueError if it is no such name."""
    kind, name, ranges = text.split("|")
    pairs = [part.split(":") for part in ranges.split(",")] if ranges else []
    return kind, name, Box(tuple((int(start), int(stop)) for start, stop in pairs))


class BoxSource:
    """Boxes from all files of a checkpoint's optimizer state, read by whatever boxes are wanted.

    ``where`` has, for each (kind, name), the stored boxes with a reader of a part of each.
    """

    def __init__(self, where: Mapping[tuple[str, str], Sequence[tuple[Box, Any]]]) -> None:
        self._where = where
        self._exact = {(*key, box): part for key, held in where.items() for box, part in held}

    def contents(self) -> list[tuple[str, str]]:
        """Kind and tensor of all that is there."""
        return sorted(self._where)

    def read(self, kind: str, name: str, box: Box) -> Tensor:
        """The elements of ``box``, float32.

        Raises:
            CheckpointError: they are not all there.
        """
        if (exact := self._exact.get((kind, name, box))) is not None:
            whole: Tensor = exact[...]
            return whole
        result = torch.empty(box.shape, dtype=torch.float32)
        missing = box.num_elements
        for held, part in self._where.get((kind, name), ()):
            common = box.intersect(held)
            if common is not None:
                result[common.relative_to(box).slices] = part[common.relative_to(held).slices]
                missing -= common.num_elements
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {missing} of {box.num_elements} elements of {kind} of {name}"
            )
        return result
