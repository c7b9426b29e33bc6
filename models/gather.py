"""Move boxes of weights between ranks: whole Hugging Face tensors out of everyone's pieces.

The plan is ``transfers.py``'s; here it is cut into rounds of bounded size and carried out with one
``all_to_all_single`` a round over WORLD.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mtrl.models.boxes import Box, Piece
from mtrl.models.builder import Model
from mtrl.models.files import TensorKind
from mtrl.models.pieces import Tensors, read_stored
from mtrl.models.transfers import Boxes, Transfer, plan_transfers
from mtrl.models.weight_map import WeightMap, owned_boxes

DEFAULT_BUCKET_BYTES = 256 * 2**20

DTYPES = {"float32": torch.float32}

Reader = Callable[[Transfer], torch.Tensor]


@dataclass(slots=True, kw_only=True)
class TransportCount:
    """Bytes that actually arrived from other ranks, added up by the transport itself."""

    bytes_received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Names that travel together, with this rank's sends and receives in the order on the wire."""

    names: tuple[str, ...]
    sends: tuple[tuple[Transfer, ...], ...]
    receives: tuple[tuple[Transfer, ...], ...]


def _num_elements(transfers: Sequence[Transfer]) -> int:
    return sum(transfer.box.num_elements for transfer in transfers)


@dataclass(slots=True)
class TensorGather:
    """Delivers whole Hugging Face tensors to the ranks that want them.

    ``wanted[r]`` are the names rank r wants. Planned once, run after every update.
    """

    model: Model
    wanted: Sequence[Sequence[str]]
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    count: TransportCount = field(default_factory=TransportCount)
    _rounds: tuple[_Round, ...] = field(init=False, repr=False)
    _own: Mapping[str, tuple[Piece, ...]] = field(init=False, repr=False)
    _kept: Mapping[str, torch.dtype] = field(init=False, repr=False)
    _shapes: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    _own_wanted: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weight_map, rank = self.model.weight_map, self.model.groups.rank
        self._shapes = shapes = weight_map.hf_shapes()
        self._own_wanted = frozenset(self.wanted[rank])
        have = held_boxes(weight_map)
        need: list[Boxes] = [{name: (Box.full(shapes[name]),) for name in names} for names in self.wanted]
        self._kept = {name: DTYPES[kept] for name, kept in weight_map.hf_dtypes().items()}
        names = _in_turn(self.wanted, shapes)
        names.sort(key=lambda name: name not in self._kept)  # the wider ones first: files stay aligned
        plan = plan_transfers(names, have, need)
        by_dtype = itertools.groupby(names, key=self._kept.get)
        self._rounds = tuple(
            each
            for _, run in by_dtype
            for each in _rounds(plan.transfers, list(run), shapes, rank, len(have), self.bucket_bytes)
        )
        own: dict[str, list[Piece]] = {}
        for piece in weight_map.of_rank(rank).pieces:
            own.setdefault(piece.hf.name, []).extend(piece.simple())
        self._own = {name: tuple(pieces) for name, pieces in own.items()}

    @property
    def names(self) -> list[str]:
        """The names this rank wants, in the order in which `run` yields them."""
        return [name for step in self._rounds for name in step.names if name in self._own_wanted]

    def kind(self, name: str, dtype: torch.dtype) -> TensorKind:
        """Dtype and shape of a tensor that `run` yields for ``dtype``."""
        return self._kept.get(name, dtype), self._shapes[name]

    def run(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for the names this rank wants, cast to ``dtype`` before they travel.

        Tensors that the weight table fixes to a dtype have that one. Collective over WORLD: every rank must
        exhaust its iterator. A yielded tensor is new memory.
        """
        tensors = self.model.tensors()
        for step in self._rounds:  # the names of a round share a dtype
            yield from self._run_round(step, tensors, self._kept.get(step.names[0], dtype))

    def _run_round(
        self, step: _Round, tensors: Tensors, dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        rank = self.model.groups.rank

        def read(transfer: Transfer) -> torch.Tensor:
            for piece in self._own[transfer.name]:
                if piece.stored.intersect(transfer.box) == transfer.box:
                    part = read_stored(tensors, piece)
                    return part[transfer.box.relative_to(piece.stored).slices].to(dtype)
            raise AssertionError(f"rank {rank} does not hold {transfer}")

        received = self._exchange(step, read, dtype)
        full = {
            name: torch.empty(self._shapes[name], dtype=dtype, device=received.device)
            for name in step.names
            if name in self._own_wanted
        }
        offset = 0
        for source, transfers in enumerate(step.receives):
            for transfer in transfers:
                if source == rank:
                    value = read(transfer)
                else:
                    size = transfer.box.num_elements
                    value = received[offset : offset + size].view(transfer.box.shape)
                    offset += size
                full[transfer.name][transfer.box.slices] = value
        yield from full.items()

    def _exchange(self, step: _Round, read: Reader, dtype: torch.dtype) -> torch.Tensor:
        rank = self.model.groups.rank
        device = next(iter(self.model.parameters().values())).device
        send_sizes = [0 if r == rank else _num_elements(sends) for r, sends in enumerate(step.sends)]
        receive_sizes = [0 if r == rank else _num_elements(got) for r, got in enumerate(step.receives)]
        parts = [read(t).flatten() for r, sends in enumerate(step.sends) if r != rank for t in sends]
        outgoing = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        incoming = torch.empty(sum(receive_sizes), dtype=dtype, device=device)
        if len(step.sends) > 1:
            dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes)
        self.count.bytes_received += incoming.numel() * incoming.element_size()
        return incoming


def held_boxes(weight_map: WeightMap) -> list[Boxes]:
    """Per rank of the layout, the boxes it holds of each Hugging Face tensor."""
    if "held_boxes" not in weight_map.memo:
        weight_map.memo["held_boxes"] = [
            owned_boxes(weight_map.of_rank(rank).pieces) for rank in range(weight_map.layout.world_size)
        ]
    return list(weight_map.memo["held_boxes"])


def _in_turn(wanted: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """All wanted names, so ordered that ranks that want different ones receive, and write, side by side."""
    position: dict[str, int] = {}
    for names in wanted:
        offset = 0
        for name in names:
            position.setdefault(name, offset)
            offset += torch.Size(shapes[name]).numel()
    return sorted(position, key=position.__getitem__)


def _rounds(
    transfers: Sequence[Transfer],
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    world_size: int,
    bucket_bytes: int,
) -> Iterator[_Round]:
    """Cut the plan by names so that what any rank sends, or receives, in a round stays near
    ``bucket_bytes``.
    """
    by_name: dict[str, list[Transfer]] = {name: [] for name in names}
    for transfer in transfers:
        if transfer.name in by_name:
            by_name[transfer.name].append(transfer)
    group: list[str] = []
    loads: Counter[tuple[str, int]] = Counter()
    for name in names:
        own: Counter[tuple[str, int]] = Counter()
        for transfer in by_name[name]:
            own["from", transfer.source] += 4 * transfer.box.num_elements
            own["to", transfer.target] += 4 * transfer.box.num_elements
        if group and any(loads[key] + size > bucket_bytes for key, size in own.items()):
            yield _one_round(group, by_name, rank, world_size)
            group, loads = [], Counter()
        group.append(name)
        loads.update(own)
    if group:
        yield _one_round(group, by_name, rank, world_size)


def _one_round(
    group: Sequence[str], by_name: Mapping[str, Sequence[Transfer]], rank: int, world_size: int
) -> _Round:
    sends: list[list[Transfer]] = [[] for _ in range(world_size)]
    receives: list[list[Transfer]] = [[] for _ in range(world_size)]
    for transfer in (transfer for name in group for transfer in by_name[name]):
        if transfer.source == rank:
            sends[transfer.target].append(transfer)
        if transfer.target == rank:
            receives[transfer.source].append(transfer)
    return _Round(names=tuple(group), sends=tuple(map(tuple, sends)), receives=tuple(map(tuple, receives)))
