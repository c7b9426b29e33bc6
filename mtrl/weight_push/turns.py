"""Copies into experts' blocks by the kernel that packs them, where that is faster.

vLLM's experts on CPUs keep [N, K] as [N / 16, K, 16]. A copy turns 16 rows a time as well, through strides;
vLLM's packing is twice as fast on some widths and slower on others, so it is timed, once for each.
"""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from mtrl.rollout.kernel_layout import PackBlocks
from mtrl.weight_push.copies import Copies, Pair

ROWS = 16
_ROWS_AT_ONCE = 32  # of vLLM's packing
_SCRATCH_BYTES, _NUM_TIMED = 2**25, 3  # beyond that all is as slow as memory

Turn: TypeAlias = tuple[Tensor, Tensor]
"""A stack of one matrix [1, N, K], and where it goes in blocks."""


def as_turn(pair: Pair) -> Turn | None:
    """The same copy as a matrix to pack; None where it is no such copy."""
    target, source = pair
    if source.dim() < 2 or not source.is_contiguous() or target.dtype != source.dtype:
        return None
    rows, width = source.shape[-2:]
    strides = (*source.stride()[:-2], 1, ROWS)
    if rows != ROWS or width < 2 or target.shape != source.shape or target.stride() != strides:
        return None
    shape = (1, source.numel() // width, width)
    if shape[1] % _ROWS_AT_ONCE:
        return None
    return source.view(shape), target.as_strided(shape, (source.numel(), width, 1), target.storage_offset())


@cache
def is_faster(pack: PackBlocks, num_rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether packing such a matrix takes less time than a copy through strides."""
    most = max(1, _SCRATCH_BYTES // (width * dtype.itemsize * _ROWS_AT_ONCE)) * _ROWS_AT_ONCE
    source = torch.zeros((1, min(num_rows, most), width), dtype=dtype)
    target = torch.zeros_like(source)
    blocks = target.view(-1, width, ROWS).transpose(1, 2)
    rows = source.view(-1, ROWS, width)
    packing = _seconds(lambda: pack(source, target))
    return packing < _seconds(lambda: blocks.copy_(rows))


def _seconds(action: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return min(once() for _ in range(_NUM_TIMED))


def packed(
    copies: Copies,
    pack: PackBlocks | None,
    is_faster: Callable[[PackBlocks, int, int, torch.dtype], bool] = is_faster,
) -> Copies:
    """The same copies, of which ``pack`` makes those that it makes faster here."""
    if pack is None:
        return copies
    found = Copies()
    for pair in copies.pairs:
        turn = as_turn(pair)
        if turn is not None and is_faster(pack, turn[0].shape[1], turn[0].shape[2], turn[0].dtype):
            found.by_kernel.append(partial(pack, *turn))
        else:
            found.destinations.append(pair[0])
            found.sources.append(pair[1])
    return found
