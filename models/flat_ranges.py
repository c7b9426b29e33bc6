"""Flat ranges of parameters as boxes of the checkpoint: where a distributed optimizer's shard belongs. Pure.

Megatron's distributed optimizer gives each data parallel rank a range ``[start, stop)`` of the elements of a
local parameter, in row-major order, and keeps state only for those. Such a range is at most 2d-1 boxes of a
parameter of d factors; each meets some of its pieces, and so becomes boxes of Hugging Face tensors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mtrl.models.boxes import Box, Piece, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class RangePiece:
    """``piece`` (simple) lies in ``run``, a box of its parameter's flat factors whose elements follow each
    other, the first of them at ``offset`` in the range.
    """

    offset: int
    run: Box
    piece: Piece

    @property
    def local_box(self) -> Box:
        """The piece's elements, counted from the corner of ``run``, in the order of the view's dims."""
        permuted = Box(tuple(self.run.ranges[index] for index in self.piece.local.order))
        return self.piece.local_box.relative_to(permuted)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of a tensor of ``shape`` that hold elements ``start`` to ``stop``, in their order.

    >>> [box.ranges for box in boxes_of_range((3, 4), 2, 8)]
    [((0, 1), (2, 4)), ((1, 2), (0, 4))]
    """
    if start >= stop:
        return
    if not shape:
        yield Box(())
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # within one row
        yield from _below(shape, start // inner, start % inner, stop - (start // inner) * inner)
        return
    if start < first * inner:
        yield from _below(shape, first - 1, start % inner, inner)
    if first < last:
        yield Box(((first, last), *((0, size) for size in shape[1:])))
    if last * inner < stop:
        yield from _below(shape, last, 0, stop - last * inner)


def _below(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box(((row, row + 1), *box.ranges))


def pieces_of_range(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[RangePiece]:
    """What a flat range of one local parameter is of the checkpoint.

    ``pieces`` are all of that parameter. Elements of padding appear in no piece.
    """
    for piece in pieces:
        offset = 0
        for run in boxes_of_range(piece.local.flat_factors, start, stop):
            permuted = Box(tuple(run.ranges[index] for index in piece.local.order))
            common = permuted.intersect(piece.local_box)
            if common is not None:
                part = Piece(
                    hf=piece.hf,
                    hf_box=_shift(common.relative_to(piece.local_box), piece.hf_box),
                    local=piece.local,
                    local_box=common,
                    chunk=piece.chunk,
                )
                for simple in part.simple():
                    yield RangePiece(offset=offset, run=run, piece=simple)
            offset += run.num_elements


def _shift(box: Box, corner: Box) -> Box:
    ranges: list[Range] = []
    for (start, stop), (low, _) in zip(box.ranges, corner.ranges, strict=True):
        ranges.append((low + start, low + stop))
    return Box(tuple(ranges))
