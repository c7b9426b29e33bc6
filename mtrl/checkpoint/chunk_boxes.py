"""Copies between two stored pieces of a weight that are cut, split and permuted differently.

A checkpoint's chunk may cut a tensor anywhere, in the middle of a fused group of heads too. A cut is a few
boxes of the tensor's view (`view_boxes`), and boxes of two views of the same weight intersect.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mtrl.models.boxes import Box, Range, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A tensor in memory is ``stored`` of the tensor of ``view``; the weight is ``box`` of that view."""

    stored: Box
    view: View
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Elements that two extents of one weight share: ``common``, from the weight's corner.

    ``target`` and ``source`` are the boxes of each extent's view that they lie in, one stored box each.
    """

    target: Box
    source: Box
    common: Box


def view_boxes(view: View, stored: Box) -> Iterator[Box]:
    """Cut a box of the stored tensor into boxes of its view, each of them one box of the stored tensor.

    >>> view = View(name="w", shape=(6,), factors=((2, 3),), order=(0, 1))
    >>> [box.ranges for box in view_boxes(view, Box(((2, 6),)))]
    [((1, 2), (0, 3)), ((0, 1), (2, 3))]
    """
    cuts = [list(_runs(factors, part)) for factors, part in zip(view.factors, stored.ranges, strict=True)]
    for combination in itertools.product(*cuts):
        flat = tuple(itertools.chain.from_iterable(combination))
        yield Box(tuple(flat[index] for index in view.order))


def _runs(factors: tuple[int, ...], part: Range) -> Iterator[tuple[Range, ...]]:
    """Cut a range of a dim into boxes of the dim's factors: what lies before, in and after whole rows."""
    start, stop = part
    if len(factors) == 1:
        yield ((start, stop),)
        return
    inner = math.prod(factors[1:])
    first, last = start // inner, (stop - 1) // inner
    low, high = -(-start // inner), stop // inner
    if low < high:
        yield ((low, high), *((0, size) for size in factors[1:]))
    ends = {first: (start - first * inner, min(stop - first * inner, inner))} if low > first else {}
    if high == last:
        ends.setdefault(last, (max(start - last * inner, 0), stop - last * inner))
    for outer, rest in ends.items():
        for run in _runs(factors[1:], rest):
            yield ((outer, outer + 1), *run)


def first_dim(view: View, box: Box) -> Range:
    """The range of the stored tensor's first dim that a box of its view lies in."""
    start, stop, stride = 0, 1, view.shape[0]
    for size, (low, high) in zip(view.factors[0], view.unpermute(box)[0], strict=True):
        stride //= size
        start, stop = start + low * stride, stop + (high - 1) * stride
    return start, stop


def overlaps(target: Extent, source: Extent) -> list[Overlap]:
    """What two extents of one weight share; the weight's boxes in both have the same shape."""
    sources = list(_parts(source))
    found = []
    for here, offset in _parts(target):
        for there, other_offset in sources:
            common = offset.intersect(other_offset)
            if common is not None:
                found.append(Overlap(target=here, source=there, common=common))
    return found


def copy(out: torch.Tensor, target: Extent, values: torch.Tensor, source: Extent, each: Overlap) -> int:
    """Copy one overlap from ``values``, which is ``source``, to ``out``. Returns how many elements it has."""
    here, there = _region(out, target, each.target), _region(values, source, each.source)
    corner, other_corner = each.target.relative_to(target.box), each.source.relative_to(source.box)
    here[each.common.relative_to(corner).slices].copy_(there[each.common.relative_to(other_corner).slices])
    return each.common.num_elements


def _parts(extent: Extent) -> Iterator[tuple[Box, Box]]:
    """The boxes of the view that make up what is held, and the weight's part of each, from its corner."""
    for box in view_boxes(extent.view, extent.stored):
        common = box.intersect(extent.box)
        if common is not None:
            yield box, common.relative_to(extent.box)


def _region(tensor: torch.Tensor, extent: Extent, box: Box) -> torch.Tensor:
    """A box of the view, in the view's dims; shares the memory of ``tensor``."""
    stored = extent.view.stored_box(box)
    assert stored is not None, f"{extent.view.name}: {box} is several boxes of the stored tensor"
    part = tensor[stored.relative_to(extent.stored).slices]
    lengths = [stop - start for ranges in extent.view.unpermute(box) for start, stop in ranges]
    return part.view(lengths).permute(extent.view.order)
