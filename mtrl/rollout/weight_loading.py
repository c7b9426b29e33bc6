"""New weights into the engine's live parameters: record what vLLM's loader does once, then replay it."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.errors import WeightError
from mtrl.rollout.kernel_layout import KernelLayout, Ranges, in_dims_of, shifted, slices_of
from mtrl.rollout.loader_record import EMPTY_RECORD, LoaderRecord, RecordedCopy, record_loader
from mtrl.rollout.vllm_mends import DERIVED_PARAMETERS

# Names recorded by one run of the loader, which walks the whole model each time; also how many of the
# trainer's full tensors are alive at once during the first load.
_NAMES_PER_RECORDING = 64

Placed: TypeAlias = tuple[Ranges, Tensor]
"""A part of a recorded copy, as ranges of its shape, and a view of the engine's live tensor with its
elements, whose row-major order is that of the part.
"""


class WeightLoader:
    """Copies full Hugging Face tensors into one rank's share of vLLM's model.

    ``group`` holds the ranks of this replica, on CPU. The first `load` records; later ones replay.
    """

    def __init__(self, model: Any, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        self._model = model
        self._dtype = dtype
        self._group = group
        self._parameters: dict[str, Tensor] = {
            name: p.data for name, p in model.named_parameters() if not name.endswith(DERIVED_PARAMETERS)
        }
        self._layouts: dict[str, KernelLayout] = {
            name: layout
            for name, p in model.named_parameters()
            if (layout := getattr(p, "kernel_layout", None)) is not None
        }
        buffers: dict[str, Tensor] = {name: b for name, b in model.named_buffers() if b.is_contiguous()}
        self._destinations: Mapping[str, Tensor] = {**buffers, **self._parameters}
        self._record = EMPTY_RECORD
        self._replays: dict[str, list[tuple[RecordedCopy, list[Placed]]]] = {}
        self._is_complete = False

    @property
    def record(self) -> LoaderRecord | None:
        """What this rank needs of each tensor; None before the first load that succeeded."""
        return self._record if self._is_complete else None

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        """The engine's live tensors that weights go to, by name."""
        return self._destinations

    def prepare(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> LoaderRecord:
        """Record what this rank needs of tensors of these shapes; collective over the replica.

        They are of the engine's dtype, or what ``dtypes`` says. Constants are written; weights
        are not. WeightError as `load` raises it.
        """
        error: WeightError | None = None
        names = list(shapes)
        try:
            for start in range(0, len(names), _NAMES_PER_RECORDING):
                chunk = names[start : start + _NAMES_PER_RECORDING]
                self._extend({name: shapes[name] for name in chunk}, dtypes)
            self._record.check_complete(self._destinations, self._parameters)
        except WeightError as caught:
            error = caught
        failed = torch.tensor([0 if error is None else 1])
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group)
        if failed.item():
            self._forget()
            raise error or WeightError("another rank of this engine refused the weights; its error says why")
        self._check_record()
        return self._record

    def placed(self, copy: RecordedCopy, ranges: Ranges) -> Iterator[Placed]:
        """Where the elements of a copy within ``ranges`` of its shape live.

        The views stay valid for as long as the parameter keeps its storage, which nothing here changes.
        """
        tensor, layout = self._destinations[copy.destination], self._layouts.get(copy.destination)
        region, shape = copy.destination_region, copy.destination_region.shape
        if layout is None:
            yield ranges, region.of(tensor)[slices_of(ranges)]
            return
        whole = region.box(tuple(tensor.shape))
        lengths = tuple(high - low for low, high in whole or ())
        if whole is None or [size for size in lengths if size > 1] != [size for size in shape if size > 1]:
            raise WeightError(f"{copy.source} goes to {copy.destination} in an order that cannot be packed")
        starts = [low for low, _ in whole]
        box = shifted(in_dims_of(lengths, ranges, shape), starts)
        for part, view in layout.pieces(tensor, box):
            yield in_dims_of(shape, shifted(part, [-low for low in starts]), lengths), view

    def replay(self, name: str, tensor: Tensor) -> None:
        """Write a full tensor to all its places."""
        self._replay(name, tensor)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether all places of a full tensor have its elements, in the dtype they are kept in."""
        for copy, parts in self._replays.get(name, ()):
            given = copy.source_region.of(tensor.detach().contiguous())
            for ranges, destination in parts:
                part = given[slices_of(ranges)].reshape(destination.shape)
                if not destination.equal(part.to(destination.dtype)):
                    return False
        return True

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Write every tensor of ``named``; collective over the replica, which all refuse or all accept.

        WeightError for a name or shape unknown, missing or doubled; the parameters are then half written.
        """
        stream = iter(named)
        error: WeightError | None = None
        try:
            self._load(stream)
        except WeightError as caught:
            error = caught
            if not self._is_complete:
                self._forget()
            # The stream may gather from other ranks as it goes; half read, it would leave them waiting.
            for _ in stream:
                continue
        failed = torch.tensor([0 if error is None else 1])
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group)
        if error is not None:
            raise error
        if failed.item():
            if not self._is_complete:
                self._forget()
            raise WeightError("another rank of this engine refused the weights; its error says why")
        if not self._is_complete:
            self._check_record()

    def _load(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        seen: set[str] = set()
        while chunk := list(islice(stream, 1 if self._is_complete else _NAMES_PER_RECORDING)):
            for name, tensor in chunk:
                if name in seen:
                    raise WeightError(f"weight {name} came twice")
                seen.add(name)
                self._check_known(name, tensor)
            if not self._is_complete:
                self._extend({name: tuple(tensor.shape) for name, tensor in chunk})
            for name, tensor in chunk:
                self._replay(name, tensor)
        missing = sorted(set(self._record.sources) - seen)
        if missing:
            raise WeightError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        if not self._is_complete:
            self._record.check_complete(self._destinations, self._parameters)

    def _check_known(self, name: str, tensor: Tensor) -> None:
        if not self._is_complete:
            return
        shape = self._record.sources.get(name)
        if shape is None:
            raise WeightError(f"{name} is no weight of this model: earlier loads did not hold it")
        if shape != tuple(tensor.shape):
            raise WeightError(f"{name} has shape {list(tensor.shape)}; the engine needs {list(shape)}")

    def _extend(
        self, sources: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> None:
        part = record_loader(self._model.load_weights, sources, self._destinations, self._dtype, dtypes)
        self._record = self._record.joined(part)
        for fill in part.fills:
            if fill.destination in self._layouts:
                raise WeightError(f"the loader fills a part of {fill.destination}, which its kernel reorders")
            fill.region.of(self._destinations[fill.destination]).fill_(fill.value)
        for copy in part.copies:
            whole = tuple((0, size) for size in copy.destination_region.shape)
            self._replays.setdefault(copy.source, []).append((copy, list(self.placed(copy, whole))))

    def _replay(self, name: str, tensor: Tensor) -> None:
        source = tensor.detach().contiguous()
        for copy, parts in self._replays.get(name, ()):
            given = copy.source_region.of(source)
            for ranges, destination in parts:
                destination.copy_(given[slices_of(ranges)].reshape(destination.shape))

    def _check_record(self) -> None:
        """Each name must be needed by some rank; collective over the replica."""
        names = list(self._record.sources)
        used = torch.tensor([1 if name in self._replays else 0 for name in names], dtype=torch.int64)
        bounds = torch.tensor([len(names), -len(names)])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        if bounds[0] != -bounds[1]:
            self._forget()
            raise WeightError(f"ranks of one engine were given {-bounds[1]} to {bounds[0]} tensors")
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._group)
        unused = [name for name, flag in zip(names, used.tolist(), strict=True) if not flag]
        if unused:
            self._forget()
            raise WeightError(f"{len(unused)} weights have no place in the engine, the first is {unused[0]}")
        self._is_complete = True

    def _forget(self) -> None:
        self._record, self._replays = EMPTY_RECORD, {}
