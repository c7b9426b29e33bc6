"""What an engine's shard needs of each Hugging Face tensor, found out by running the model's own loader.

The loader is run once on tensors without storage (``meta``). Every write that it makes into a live
parameter is caught and written down as geometry: this region of that source tensor goes to that
region of this parameter. Replaying the record with real tensors is then a list of copies, right by
construction for each model and layout that the loader itself supports, and the record is what a
byte-minimal push plans from.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtrl.parallel.errors import WeightError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A strided part of a contiguous tensor: ``shape``, ``stride`` and ``offset`` in elements.

    ``stride`` 0 repeats an element (only in sources).
    """

    shape: Shape
    stride: tuple[int, ...]
    offset: int

    def to_json(self) -> tuple[Any, ...]:
        """What `from_json` takes."""
        return self.shape, self.stride, self.offset

    @classmethod
    def from_json(cls, found: Sequence[Any]) -> "Region":
        """The same region."""
        shape, stride, offset = found
        return cls(shape=tuple(shape), stride=tuple(stride), offset=offset)

    def of(self, owner: Tensor) -> Tensor:
        """The view of this region on contiguous ``owner``; it shares storage."""
        return owner.as_strided(self.shape, self.stride, owner.storage_offset() + self.offset)

    def box(self, owner_shape: Shape) -> tuple[tuple[int, int], ...] | None:
        """The region as ``(start, stop)`` for each dim of its owner; None if it is not such a box.

        A box holds its elements in the owner's own order (a transposed region is none).

        >>> Region(shape=(2, 3), stride=(4, 1), offset=5).box((6, 4))
        ((1, 3), (1, 4))
        """
        if math.prod(self.shape) == 0:
            return None
        first: list[int] = []
        rest = self.offset
        owner_stride = contiguous_stride(owner_shape)
        for stride in owner_stride:
            first.append(rest // stride)
            rest %= stride
        dims = [(size, stride) for size, stride in zip(self.shape, self.stride, strict=True) if size > 1]
        extents = [1] * len(owner_shape)
        cursor = 0
        for size, stride in dims:
            while cursor < len(owner_stride) and (owner_stride[cursor] != stride or owner_shape[cursor] == 1):
                cursor += 1
            if cursor == len(owner_stride) or first[cursor] + size > owner_shape[cursor]:
                return None
            extents[cursor] = size
            cursor += 1
        return tuple((start, start + extent) for start, extent in zip(first, extents, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCopy:
    """``destination[destination_region] = source[source_region]``, elementwise, cast to its dtype."""

    source: str
    source_region: Region
    destination: str
    destination_region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedFill:
    """``destination[region] = value``: padding, of the vocabulary for instance."""

    destination: str
    region: Region
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRecord:
    """Everything one rank's loader does with a set of source tensors.

    ``sources`` maps each source name that was offered to its full shape, in the order offered; a source
    without a copy is not needed on this rank (an expert of another rank).
    """

    sources: Mapping[str, Shape]
    copies: tuple[RecordedCopy, ...]
    fills: tuple[RecordedFill, ...]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        copies = [
            (each.source, each.source_region.to_json(), each.destination, each.destination_region.to_json())
            for each in self.copies
        ]
        fills = [(each.destination, each.region.to_json(), each.value) for each in self.fills]
        return {"sources": dict(self.sources), "copies": copies, "fills": fills}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "LoaderRecord":
        """The same record."""
        return cls(
            sources={name: tuple(shape) for name, shape in found["sources"].items()},
            copies=tuple(
                RecordedCopy(
                    source=source,
                    source_region=Region.from_json(one),
                    destination=target,
                    destination_region=Region.from_json(other),
                )
                for source, one, target, other in found["copies"]
            ),
            fills=tuple(
                RecordedFill(destination=target, region=Region.from_json(region), value=value)
                for target, region, value in found["fills"]
            ),
        )

    def only(self, sources: Collection[str]) -> "LoaderRecord":
        """What it says of these sources."""
        return LoaderRecord(
            sources={name: shape for name, shape in self.sources.items() if name in sources},
            copies=tuple(each for each in self.copies if each.source in sources),
            fills=(),
        )

    @property
    def used_sources(self) -> frozenset[str]:
        """Names of the sources of which this rank needs at least one element."""
        return frozenset(copy.source for copy in self.copies)

    def joined(self, other: "LoaderRecord") -> "LoaderRecord":
        """Both records as one; WeightError if they share a source."""
        doubled = sorted(set(self.sources) & set(other.sources))
        if doubled:
            raise WeightError(f"weight {doubled[0]} came twice")
        return LoaderRecord(
            sources={**self.sources, **other.sources},
            copies=self.copies + other.copies,
            fills=self.fills + other.fills,
        )

    def check_complete(self, destinations: Mapping[str, Tensor], required: Iterable[str]) -> None:
        """Raise WeightError unless each element of the ``required`` destinations is written exactly once."""
        written = {
            name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in destinations.items()
        }
        regions = [(copy.destination, copy.destination_region, copy.source) for copy in self.copies]
        regions += [(fill.destination, fill.region, "a constant") for fill in self.fills]
        for name, region, source in regions:
            view = region.of(written[name])
            if bool(view.any()):
                raise WeightError(f"{source} writes a part of {name} that another weight had written")
            view.fill_(True)
        for name in required:
            missing = int((~written[name]).sum())
            if missing:
                raise WeightError(
                    f"{missing} of {written[name].numel()} elements of the engine's {name} got no weight; "
                    f"{len(self.sources)} tensors were given, so at least one name is missing"
                )


EMPTY_RECORD = LoaderRecord(sources={}, copies=(), fills=())


def contiguous_stride(shape: Shape) -> tuple[int, ...]:
    """Element strides of a contiguous tensor.

    >>> contiguous_stride((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def record_loader(
    load: Callable[[Iterable[tuple[str, Tensor]]], object],
    sources: Mapping[str, Shape],
    destinations: Mapping[str, Tensor],
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> LoaderRecord:
    """Run ``load`` on storage-less tensors named and shaped as ``sources``; return what it would have done.

    Sources are of ``dtype``, or what ``dtypes`` says. ``destinations`` are the live tensors, contiguous and
    keyed by name; none of them is changed. WeightError when the loader refuses a name or does with a weight
    what is neither a copy of a region nor a constant.
    """
    fakes = {
        name: torch.empty(shape, dtype=dtypes.get(name, dtype), device="meta")
        for name, shape in sources.items()
    }
    recorder = _Recorder(fakes, destinations)
    try:
        with torch.no_grad(), recorder:
            load(iter(fakes.items()))
    except WeightError:
        raise
    except (
        KeyError,
        ValueError,
        RuntimeError,
        AssertionError,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        names = ", ".join(list(sources)[:3]) + (f" ... ({len(sources)} names)" if len(sources) > 3 else "")
        raise WeightError(
            f"the engine's loader refuses a weight of {names}: {type(error).__name__}: {error}"
        ) from error
    return LoaderRecord(sources=dict(sources), copies=tuple(recorder.copies), fills=tuple(recorder.fills))


class _Recorder(TorchDispatchMode):
    """Writes into live tensors are written down instead of done; everything else runs."""

    def __init__(self, fakes: Mapping[str, Tensor], destinations: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[RecordedCopy] = []
        self.fills: list[RecordedFill] = []
        self._sources = {_storage_key(tensor): name for name, tensor in fakes.items()}
        self._destinations = {_storage_key(tensor): (name, tensor) for name, tensor in destinations.items()}
        # By storage: a contiguous copy that the loader made of a source's view, and that view.
        self._clones: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            owner = self._destinations.get(_storage_key(args[0]))
            if owner is not None:
                self._write_down(func, owner, args)
                return args[0]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.clone and _storage_key(args[0]) in self._sources:
            self._clones[_storage_key(result)] = (result, args[0])
        return result

    def _source_view(self, given: Tensor) -> Tensor:
        """``given``, or the view of a source that it is a contiguous copy of, or a box of such a copy."""
        clone, view = self._clones.get(_storage_key(given), (None, given))
        if clone is None:
            return given
        box = _region(given, 0).box(tuple(clone.shape)) if clone.is_contiguous() else None
        if box is None:
            return given
        return view[tuple(slice(start, stop) for start, stop in box)].view(given.shape)

    def _write_down(self, func: Any, owner: tuple[str, Tensor], args: tuple[Any, ...]) -> None:
        name, tensor = owner
        target = args[0]
        region = _region(target, int(tensor.storage_offset()))
        if target.numel() == 0:
            return
        packet = func.overloadpacket
        if packet is torch.ops.aten.copy_:
            given = self._source_view(args[1])
            source = self._sources.get(_storage_key(given))
            if source is None:
                raise WeightError(
                    f"the loader computes what it writes to {name}; only plain copies can be recorded"
                )
            source_region = _region(given.expand(target.shape), 0)
            self.copies.append(
                RecordedCopy(
                    source=source, source_region=source_region, destination=name, destination_region=region
                )
            )
        elif packet is torch.ops.aten.zero_:
            self.fills.append(RecordedFill(destination=name, region=region, value=0.0))
        elif packet is torch.ops.aten.fill_ and not isinstance(args[1], Tensor):
            self.fills.append(RecordedFill(destination=name, region=region, value=float(args[1])))
        else:
            raise WeightError(f"the loader does {func} to {name}; only copies and constants can be recorded")


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _region(view: Tensor, owner_offset: int) -> Region:
    return Region(
        shape=tuple(view.shape), stride=tuple(view.stride()), offset=int(view.storage_offset()) - owner_offset
    )
