"""Tensors over ranks as *flows*: boxes of one size that the same ranks have and the same ranks need. Pure.

However many tensors and layers a model has, its flows are few: as many as there are different sets of ranks.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from mtrl.models.boxes import Box
from mtrl.parallel.errors import WeightError

Ranks = tuple[int, ...]

LARGEST_BYTES = 64 * 2**20
"""Boxes beyond this are cut, so that one tensor does not burden one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """Tensors that lie alike: of each of ``names``, ranks ``have[box]`` hold ``box`` and ``need[box]`` want
    it.

    The boxes that one rank needs are disjoint. ``itemsize`` is an element's bytes on the wire.
    """

    names: tuple[str, ...]
    have: Mapping[Box, Ranks]
    need: Mapping[Box, Ranks]
    itemsize: int = 1


@dataclass(slots=True, kw_only=True)
class Flow:
    """Boxes of ``num_bytes`` each that ``holders`` have and ``needers`` need; both ascend."""

    holders: Ranks
    needers: Ranks
    num_bytes: int
    parts: list[tuple[tuple[str, ...], Box]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many boxes."""
        return sum(len(names) for names, _ in self.parts)


def flows_of(tensors: Iterable[Alike]) -> list[Flow]:
    """The flows of all tensors, in the order in which they first appear."""
    found: dict[tuple[Ranks, Ranks, int], Flow] = {}
    for alike in tensors:
        have, need = tuple(alike.have), tuple(alike.need)
        holders = [alike.have[box] for box in have]
        needers = [alike.need[box] for box in need]
        for box, held_by, needed_by in _cells(have, need):
            if not held_by:
                raise WeightError(
                    f"no rank holds {alike.names[0]}{[list(r) for r in box.ranges]}, which rank "
                    f"{needers[needed_by[0]][0]} needs"
                )
            having, needing = _union(holders, held_by), _union(needers, needed_by)
            for part in _cut(box, alike.itemsize):
                num_bytes = part.num_elements * alike.itemsize
                key = (having, needing, num_bytes)
                if key not in found:
                    found[key] = Flow(holders=having, needers=needing, num_bytes=num_bytes)
                found[key].parts.append((alike.names, part))
    return list(found.values())


def _union(groups: Sequence[Ranks], chosen: Sequence[int]) -> Ranks:
    if len(chosen) == 1:
        return groups[chosen[0]]
    return tuple(sorted(set().union(*(groups[index] for index in chosen))))


def _cut(box: Box, itemsize: int) -> Iterator[Box]:
    """``box`` in parts of at most `LARGEST_BYTES`, cut along its longest dim as evenly as it goes."""
    ways = -(-box.num_elements * itemsize // LARGEST_BYTES)
    if ways <= 1:
        yield box
        return
    dim = max(range(len(box.ranges)), key=lambda index: box.shape[index])
    start, stop = box.ranges[dim]
    ways = min(ways, stop - start)
    edges = [start + (stop - start) * part // ways for part in range(ways + 1)]
    for edge in itertools.pairwise(edges):
        yield Box((*box.ranges[:dim], edge, *box.ranges[dim + 1 :]))


Cell = tuple[Box, tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=1024)
def _cells(have: tuple[Box, ...], need: tuple[Box, ...]) -> tuple[Cell, ...]:
    """Disjoint boxes that together are all of ``need``, each with the indices of the boxes it lies in."""
    num_dims = len(need[0].ranges) if need else 0
    edges = [sorted({edge for box in (*have, *need) for edge in box.ranges[dim]}) for dim in range(num_dims)]
    cells: list[Cell] = []
    for ranges in itertools.product(*(itertools.pairwise(each) for each in edges)):
        cell = Box(ranges)
        needed_by = tuple(index for index, box in enumerate(need) if box.intersect(cell))
        if needed_by:
            cells.append(
                (cell, tuple(index for index, box in enumerate(have) if box.intersect(cell)), needed_by)
            )
    for dim in range(num_dims):
        cells = _merged(cells, dim)
    return tuple(cells)


def _merged(cells: Sequence[Cell], dim: int) -> list[Cell]:
    """Neighbours along ``dim`` that lie in the same boxes become one."""
    merged: list[Cell] = []
    last: dict[object, int] = {}
    for cell, held_by, needed_by in cells:
        others = (*cell.ranges[:dim], *cell.ranges[dim + 1 :])
        at = last.get(others)
        if at is not None:
            before, *signature = merged[at]
            if signature == [held_by, needed_by] and before.ranges[dim][1] == cell.ranges[dim][0]:
                joined = (before.ranges[dim][0], cell.ranges[dim][1])
                box = Box((*cell.ranges[:dim], joined, *cell.ranges[dim + 1 :]))
                merged[at] = (box, held_by, needed_by)
                continue
        last[others] = len(merged)
        merged.append((cell, held_by, needed_by))
    return merged
