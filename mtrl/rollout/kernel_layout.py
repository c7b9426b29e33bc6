"""Where a kernel keeps the elements of a weight: found by packing numbered elements, then written to
directly.

vLLM's CPU experts compute on weights in blocks. Packing anew after each update would copy every weight twice
and hold it twice; knowing the order, new weights are written into the packed tensor at once.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]

PackBlocks: TypeAlias = Callable[[Tensor, Tensor], None]
"""Writes a stack of matrices [1, N, K], N a multiple of 32, to where a `KernelLayout` of 16 rows and one
column keeps them.
"""

_ROWS, _COLUMNS = (1, 16, 32), (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLayout:
    """A stack of matrices [..., N, K] kept as [..., N / rows, K / columns, rows, columns].

    ``swapped``: its halves of N, experts' gate and up, have changed places before.
    """

    rows: int = 1
    columns: int = 1
    swapped: bool = False

    def pieces(self, packed: Tensor, box: Ranges) -> Iterator[tuple[Ranges, Tensor]]:
        """The elements of ``box``, which is in the coordinates of the matrices as they were before packing.

        Yields parts of the box, each with a view of its elements in ``packed`` whose row-major order is that
        of the part.
        """
        *stack, num_rows, num_columns = packed.shape
        rows, columns = self.rows, self.columns
        blocked = packed.view(*stack, num_rows // rows, num_columns // columns, rows, columns)
        unpacked = blocked.transpose(-2, -3)  # [..., N / rows, rows, K / columns, columns]
        outer = slices_of(box[:-2])
        for part, shift in self._moved(*box[-2], num_rows // 2):
            there = (part[0] + shift, part[1] + shift)
            for row_part, column_part in itertools.product(_cuts(*there, rows), _cuts(*box[-1], columns)):
                slices = (*outer, *_within(row_part, rows), *_within(column_part, columns))
                low, high = row_part
                yield (*box[:-2], (low - shift, high - shift), column_part), unpacked[slices]

    def _moved(self, start: int, stop: int, half: int) -> Iterator[tuple[tuple[int, int], int]]:
        """Parts of a range of rows, and by how much each is moved."""
        if not self.swapped:
            yield (start, stop), 0
            return
        for low, high, shift in ((start, min(stop, half), half), (max(start, half), stop, -half)):
            if low < high:
                yield (low, high), shift


def slices_of(ranges: Ranges) -> tuple[slice, ...]:
    """To index a tensor with."""
    return tuple(slice(low, high) for low, high in ranges)


def shifted(ranges: Ranges, by: Sequence[int]) -> Ranges:
    """The ranges moved, each by its own amount."""
    return tuple((low + each, high + each) for (low, high), each in zip(ranges, by, strict=True))


def in_dims_of(target: Sequence[int], ranges: Ranges, shape: Sequence[int]) -> Ranges:
    """Ranges of a tensor of ``shape`` in the dims of ``target``, a shape that differs in dims of 1 only.

    >>> in_dims_of((1, 6, 4), ((2, 3), (0, 4)), (6, 4))
    ((0, 1), (2, 3), (0, 4))
    """
    longer = iter([each for each, size in zip(ranges, shape, strict=True) if size > 1])
    return tuple(next(longer) if size > 1 else (0, 1) for size in target)


def _cuts(start: int, stop: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the blocks' borders: what is left of a first block, whole blocks, a begun last one."""
    first, last = -(-start // block) * block, stop // block * block
    if first > last:  # within one block
        first = last = stop
    for low, high in ((start, first), (first, last), (last, stop)):
        if low < high:
            yield low, high


def _within(part: tuple[int, int], block: int) -> tuple[slice, slice]:
    """A part that `_cuts` gives as slices over blocks and within them."""
    low, high = part
    if low % block == 0 and high % block == 0:
        return slice(low // block, high // block), slice(None)
    return slice(low // block, low // block + 1), slice(low % block, low % block + high - low)


def find_layout(
    pack: Callable[[Tensor], Tensor], shape: Sequence[int], dtype: torch.dtype
) -> KernelLayout | None:
    """How ``pack`` orders the elements of a matrix [N, K]; None where it is no such order.

    ``pack`` takes and returns a stack of one matrix, and must only move elements.
    """
    num_rows, num_columns = shape
    # Numbered in base 128, digit by digit: small integers are exact in every dtype.
    number = torch.arange(num_rows * num_columns).view(1, num_rows, num_columns)
    digits: list[Tensor] = []
    while not digits or bool((number > 0).any()):
        digits.append((number % 128).to(dtype))
        number = number // 128
    packed = [pack(digit) for digit in digits]
    if any(each.shape != digits[0].shape for each in packed):
        return None
    for swapped, rows, columns in itertools.product((False, True), _ROWS, _COLUMNS):
        if num_rows % rows or num_columns % columns or (swapped and num_rows % (2 * rows)):
            continue
        layout = KernelLayout(rows=rows, columns=columns, swapped=swapped)
        whole = ((0, 1), (0, num_rows), (0, num_columns))
        if all(
            torch.equal(view.reshape(given.shape), given)
            for digit, each in zip(digits, packed, strict=True)
            for part, view in layout.pieces(each, whole)
            for given in (digit[slices_of(part)],)
        ):
            return layout
    return None
