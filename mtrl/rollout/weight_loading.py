"""New weights into the engine's live parameters: record what vLLM's loader does once, then replay it."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.errors import WeightError
from mtrl.rollout.loader_record import EMPTY_RECORD, LoaderRecord, record_loader
from mtrl.rollout.places import Places
from mtrl.rollout.vllm_mends import DERIVED_PARAMETERS

# Names recorded by one run of the loader, which walks the whole model each time; also how many of the
# trainer's full tensors are alive at once during the first load.
_NAMES_PER_RECORDING = 64


class WeightLoader:
    """Copies full Hugging Face tensors into one rank's share of vLLM's model.

    ``group`` holds the ranks of this replica, on CPU. The first `load` records; later ones replay.
    ``places``: the engine's live tensors that weights go to.
    """

    def __init__(self, model: Any, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        self._model = model
        self._dtype = dtype
        self._group = group
        self._parameters: dict[str, Tensor] = {
            name: p.data for name, p in model.named_parameters() if not name.endswith(DERIVED_PARAMETERS)
        }
        layouts = {
            name: layout
            for name, p in model.named_parameters()
            if (layout := getattr(p, "kernel_layout", None)) is not None
        }
        buffers: dict[str, Tensor] = {name: b for name, b in model.named_buffers() if b.is_contiguous()}
        self.places = Places({**buffers, **self._parameters}, layouts)
        self._record = EMPTY_RECORD
        self._is_complete = False

    @property
    def record(self) -> LoaderRecord | None:
        """What this rank needs of each tensor; None before the first load that succeeded."""
        return self._record if self._is_complete else None

    def prepare(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> LoaderRecord:
        """Record anew what this rank needs of tensors of these shapes; collective over the replica.

        They are of the engine's dtype, or what ``dtypes`` says. Constants are written; weights
        are not. WeightError as `load` raises it.
        """
        self._forget()
        error: WeightError | None = None
        names = list(shapes)
        try:
            for start in range(0, len(names), _NAMES_PER_RECORDING):
                chunk = names[start : start + _NAMES_PER_RECORDING]
                self._extend({name: shapes[name] for name in chunk}, dtypes)
            self._record.check_complete(self.places.destinations, self._parameters)
        except WeightError as caught:
            error = caught
        failed = torch.tensor([0 if error is None else 1])
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group)
        if failed.item():
            self._forget()
            raise error or WeightError("another rank of this engine refused the weights; its error says why")
        self._check_record()
        return self._record

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
                self.places.replay(name, tensor)
        missing = sorted(set(self._record.sources) - seen)
        if missing:
            raise WeightError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        if not self._is_complete:
            self._record.check_complete(self.places.destinations, self._parameters)

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
        part = record_loader(self._model.load_weights, sources, self.places.destinations, self._dtype, dtypes)
        self._record = self._record.joined(part)
        for fill in part.fills:
            if fill.destination in self.places.layouts:
                raise WeightError(f"the loader fills a part of {fill.destination}, which its kernel reorders")
            fill.region.of(self.places.destinations[fill.destination]).fill_(fill.value)
        self.places.remember(part.copies)

    def _check_record(self) -> None:
        """Each name must be needed by some rank; collective over the replica."""
        names = list(self._record.sources)
        used = torch.tensor([int(self.places.has_place_for(name)) for name in names], dtype=torch.int64)
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
        self._record, self._is_complete = EMPTY_RECORD, False
        self.places.forget()
