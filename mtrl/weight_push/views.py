"""Views of the elements of Hugging Face tensors in live tensors: the trainer's, the engine's."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from mtrl.models.boxes import Box, Piece
from mtrl.models.builder import Model
from mtrl.models.flat_ranges import boxes_of_range
from mtrl.models.pieces import stored_region
from mtrl.rollout.kernel_layout import Ranges, in_dims_of, shifted
from mtrl.rollout.loader_record import RecordedCopy
from mtrl.rollout.places import Placed
from mtrl.weight_push.copies import Pair, common_shape
from mtrl.weight_push.plan import Needs

View: TypeAlias = Iterator[tuple[Box, Tensor]]
"""Parts of a box, each with a view of its elements in some shape whose row-major order is the part's."""

Look: TypeAlias = Callable[[str, Box], View]
"""Finds a box of a Hugging Face tensor."""


@dataclass(slots=True, kw_only=True)
class EngineViews:
    """Makes views of boxes of Hugging Face tensors in an engine's live tensors, of this rank or another."""

    needs: Needs
    placed: Callable[[RecordedCopy, Ranges], Iterator[Placed]]
    staging: Mapping[str, Tensor]

    def wanted(self, name: str, box: Box) -> View:
        """Where the engine wants the elements of ``box``."""
        if name in self.staging:
            yield box, self.staging[name][box.slices]
            return
        for source, copy in self.needs.copies[name]:
            common = source.intersect(box)
            if common is None:
                continue
            shape, starts = copy.source_region.shape, [low for low, _ in source.ranges]
            for part, view in self.placed(
                copy, in_dims_of(shape, common.relative_to(source).ranges, source.shape)
            ):
                yield Box(shifted(in_dims_of(source.shape, part, shape), starts)), view

    def delivered(self, name: str, box: Box) -> View:
        """As `wanted`, and each element once: where a copy of what this rank has received can be read."""
        rest = [box]
        while rest:
            part, view = next(iter(self.wanted(name, rest.pop())))
            yield part, view
            rest = [left for each in rest for left in each.subtract(part)]


@dataclass(slots=True, kw_only=True)
class Views(EngineViews):
    """On this rank, those of its engine and of its trainer."""

    model: Model
    tensors: Mapping[Any, Tensor]
    """The trainer's, by what its weight map calls them."""
    images: Mapping[str, Sequence[tuple[Box, Tensor]]] = field(default_factory=dict)
    """What is sent in place of the trainer's own tensors: boxes, each with its elements."""
    _pieces: dict[str, list[tuple[Box, Piece]]] = field(init=False)

    def __post_init__(self) -> None:
        self._pieces = {}
        for piece in self.model.weight_map.of_rank(self.model.groups.rank).pieces:
            for simple in piece.simple():
                self._pieces.setdefault(simple.hf.name, []).append((simple.stored, simple))

    def held(self, name: str, box: Box) -> View:
        """The trainer's elements of ``box``."""
        if name in self.images:
            whole, image = next((h, i) for h, i in self.images[name] if h.intersect(box) == box)
            yield box, image[box.relative_to(whole).slices]
            return
        held, piece = next((h, p) for h, p in self._pieces[name] if h.intersect(box) == box)
        region = stored_region(self.tensors, piece)
        lengths = _grouped(tuple(region.shape), [len(factors) for factors in piece.hf.factors])
        for part, factors in _factor_boxes(lengths, box.relative_to(held)):
            ranges = zip(part.ranges, held.ranges, strict=True)
            yield Box(tuple((low + a, low + b) for (a, b), (low, _) in ranges)), region[factors.slices]


def matched(read: Look, write: Look, name: str, box: Box) -> Iterator[Pair]:
    """Where ``write`` finds what ``read`` finds: (target, source) views of the same elements."""
    for part, source in read(name, box):
        for wanted, target in write(name, part):
            if wanted == part and common_shape(target.shape, source.shape) is not None:
                yield target, source
            else:
                for smaller in (wanted,) if wanted != part else _halves(part):
                    yield from matched(read, write, name, smaller)


def _halves(box: Box) -> tuple[Box, Box]:
    """Cut along the longest dim."""
    dim = max(range(len(box.ranges)), key=lambda each: box.shape[each])
    low, high = box.ranges[dim]
    middle = (low + high) // 2
    return tuple(  # type: ignore[return-value]
        Box((*box.ranges[:dim], part, *box.ranges[dim + 1 :])) for part in ((low, middle), (middle, high))
    )


def _grouped(shape: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    sizes = iter(shape)
    return [tuple(itertools.islice(sizes, count)) for count in counts]


def _factor_boxes(lengths: Sequence[tuple[int, ...]], box: Box) -> Iterator[tuple[Box, Box]]:
    """Cut ``box`` of a tensor whose dims are split into factors into boxes of the factors.

    Yields each as a box of the tensor and as one of all factors in sequence.
    """
    cuts: list[list[tuple[tuple[int, int], Box]]] = []
    for factors, (start, stop) in zip(lengths, box.ranges, strict=True):
        parts, at = [], start
        for part in boxes_of_range(factors, start, stop):
            parts.append(((at, at + part.num_elements), part))
            at += part.num_elements
        cuts.append(parts)
    for chosen in itertools.product(*cuts):
        whole = Box(tuple(part_range for part_range, _ in chosen))
        yield whole, Box(tuple(itertools.chain.from_iterable(part.ranges for _, part in chosen)))
