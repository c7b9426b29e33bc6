"""Lists of copies between views of live tensors, made once and few: what a push runs through."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Destination and source, of as many elements in the same row-major order."""


@dataclass(slots=True)
class Copies:
    """Copies that are made in one call, or few; dtypes may differ."""

    destinations: list[Tensor] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    by_kernel: list[Callable[[], None]] = field(default_factory=list)
    """Further copies, each made by a call."""

    def add(self, destination: Tensor, source: Tensor) -> None:
        """Give both one shape: dims are split where the other side has more of them, which needs no copy."""
        shape = common_shape(destination.shape, source.shape)
        assert shape is not None, (destination.shape, source.shape)
        self.destinations.append(destination.view(shape))
        self.sources.append(source.view(shape))

    def extend(self, pairs: Iterable[Pair]) -> None:
        """Add all."""
        for destination, source in pairs:
            self.add(destination, source)

    def run(self) -> None:
        """Make them."""
        if self.destinations:
            torch._foreach_copy_(self.destinations, self.sources)
        for each in self.by_kernel:
            each()

    def __len__(self) -> int:
        return len(self.destinations) + len(self.by_kernel)

    @property
    def pairs(self) -> list[Pair]:
        """One by one."""
        return list(zip(self.destinations, self.sources, strict=True))

    def coalesced(self) -> "Copies":
        """The same copies in fewer: those that go on where another ends, or follow others at equal distances.

        Experts, and their gates and ups, often lie in the same order in trainer and engine.
        """
        flat: list[tuple[Tensor, Tensor]] = []
        rest: list[tuple[Tensor, Tensor]] = []
        for destination, source in self.pairs:
            if destination.is_contiguous() and source.is_contiguous() and destination.dtype == source.dtype:
                flat.append((destination.view(-1), source.view(-1)))
            else:
                rest.append((destination, source))
        for run in _runs(sorted(flat, key=_place), lambda run, pair: _goes_on(run[-1], pair)):
            size = sum(destination.numel() for destination, _ in run)
            first, second = (tensor.as_strided((size,), (1,), tensor.storage_offset()) for tensor in run[0])
            rest.append((first, second))
        found = Copies()
        for run in _runs(sorted(rest, key=lambda pair: (_form(pair), _place(pair))), _is_next):
            destination, source = run[0]
            if len(run) > 1:
                to, of = _steps(run[0], run[1])
                destination, source = _stack(destination, to, len(run)), _stack(source, of, len(run))
            found.destinations.append(destination)
            found.sources.append(source)
        return found


def _runs(pairs: Sequence[Pair], belongs: Callable[[Sequence[Pair], Pair], bool]) -> Iterator[list[Pair]]:
    run: list[Pair] = []
    for pair in pairs:
        if run and not belongs(run, pair):
            yield run
            run = []
        run.append(pair)
    if run:
        yield run


def _place(pair: Pair) -> tuple[int, int]:
    return pair[0].untyped_storage().data_ptr(), int(pair[0].storage_offset())


def _form(pair: Pair) -> tuple[Any, ...]:
    """What pairs that can be stacked have in common."""
    return tuple(
        (str(t.dtype), t.untyped_storage().data_ptr(), tuple(t.shape), tuple(t.stride())) for t in pair
    )


def _steps(last: Pair, pair: Pair) -> tuple[int, int]:
    first, second = (int(b.storage_offset() - a.storage_offset()) for a, b in zip(last, pair, strict=True))
    return first, second


def _goes_on(last: Pair, pair: Pair) -> bool:
    """Whether it begins, on both sides, where the last one ends in the same storage."""
    same = all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in zip(last, pair, strict=True)
    )
    return same and _steps(last, pair) == (last[0].numel(), last[1].numel())


def _is_next(run: Sequence[Pair], pair: Pair) -> bool:
    """Whether it follows as the run's pairs follow each other."""
    if _form(run[-1]) != _form(pair) or min(_steps(run[-1], pair)) <= 0:
        return False
    return len(run) == 1 or _steps(run[-1], pair) == _steps(run[-2], run[-1])


def _stack(first: Tensor, step: int, count: int) -> Tensor:
    return first.as_strided((count, *first.shape), (step, *first.stride()), first.storage_offset())


def common_shape(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that splits the dims of both, of as many elements; None where they do not divide.

    >>> common_shape((6, 4), (2, 3, 4))
    (2, 3, 4)
    """
    assert math.prod(one) == math.prod(other)
    sizes = sorted({math.prod(shape[dim:]) for shape in (one, other) for dim in range(len(shape) + 1)} | {1})
    if any(big % small for small, big in itertools.pairwise(sizes)):
        return None
    return tuple(big // small for small, big in itertools.pairwise(sizes))[::-1]
