"""Where the elements of Hugging Face tensors live in an engine's tensors, once its loader was recorded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from mtrl.parallel.errors import WeightError
from mtrl.rollout.kernel_layout import KernelLayout, Ranges, in_dims_of, shifted, slices_of
from mtrl.rollout.loader_record import RecordedCopy

Placed: TypeAlias = tuple[Ranges, Tensor]
"""A part of a recorded copy, as ranges of its shape, and a view of the engine's live tensor with its
elements, whose row-major order is that of the part.
"""


@dataclass(slots=True)
class Places:
    """An engine's live tensors by name, of any process that has them mapped, and the order in which kernels
    keep some of them. They keep their storage.
    """

    destinations: Mapping[str, Tensor]
    layouts: Mapping[str, KernelLayout]
    _replays: dict[str, list[tuple[RecordedCopy, list[Placed]]]] = field(default_factory=dict)

    def placed(self, copy: RecordedCopy, ranges: Ranges) -> Iterator[Placed]:
        """Where the elements of a copy within ``ranges`` of its shape live."""
        tensor, layout = self.destinations[copy.destination], self.layouts.get(copy.destination)
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

    def remember(self, copies: Iterable[RecordedCopy]) -> None:
        """Have `replay` make these copies."""
        for copy in copies:
            whole = tuple((0, size) for size in copy.destination_region.shape)
            self._replays.setdefault(copy.source, []).append((copy, list(self.placed(copy, whole))))

    def forget(self) -> None:
        """Have it make none."""
        self._replays.clear()

    def has_place_for(self, name: str) -> bool:
        """Whether any element of the tensor is needed here."""
        return name in self._replays

    def replay(self, name: str, tensor: Tensor) -> None:
        """Write a full tensor to all its places, as the loader would."""
        source = tensor.detach().contiguous()
        for copy, parts in self._replays.get(name, ()):
            given = copy.source_region.of(source)
            for ranges, destination in parts:
                destination.copy_(given[slices_of(ranges)].reshape(destination.shape))

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether all places of a full tensor have its elements, in the dtype they are kept in."""
        for copy, parts in self._replays.get(name, ()):
            given = copy.source_region.of(tensor.detach().contiguous())
            for ranges, destination in parts:
                part = given[slices_of(ranges)].reshape(destination.shape)
                if not destination.equal(part.to(destination.dtype)):
                    return False
        return True
