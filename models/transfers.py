"""From "boxes that each rank has" and "boxes that each rank needs" to transfers. Pure.

A needed element comes from exactly one source: the rank itself if it has it, else the holder that has
been asked to send least so far. Rank r so receives exactly the elements of need(r) minus have(r).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtrl.models.boxes import Box
from mtrl.parallel.errors import WeightError

Boxes = Mapping[str, tuple[Box, ...]]  # of each Hugging Face tensor, in its own dims


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """``box`` of tensor ``name`` goes from rank ``source`` to rank ``target`` (the same for a copy)."""

    name: str
    box: Box
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """Transfers, in the order of names given to ``plan_transfers``; every rank computes the same."""

    transfers: tuple[Transfer, ...]

    def num_received(self, rank: int) -> int:
        """Elements that ``rank`` receives from other ranks."""
        return sum(t.box.num_elements for t in self.transfers if t.target == rank != t.source)


def plan_transfers(names: Sequence[str], have: Sequence[Boxes], need: Sequence[Boxes]) -> TransferPlan:
    """Plan for all ranks at once.

    Args:
        names: the tensors to plan for, in the order in which they are to travel.
        have: per rank, the boxes it holds of each tensor.
        need: per rank, the boxes it wants of each tensor; those of one rank and tensor are disjoint.

    Raises:
        WeightError: some needed element is held by no rank.
    """
    num_sent = [0] * len(have)
    transfers: list[Transfer] = []
    for name in names:
        holders: dict[Box, list[int]] = {}
        for rank, boxes in enumerate(have):
            for box in boxes.get(name, ()):
                holders.setdefault(box, []).append(rank)
        for target, wanted in enumerate(need):
            for box in wanted.get(name, ()):
                transfers.extend(_cover(name, box, target, holders, num_sent))
    return TransferPlan(transfers=tuple(transfers))


def _cover(
    name: str, box: Box, target: int, holders: Mapping[Box, list[int]], num_sent: list[int]
) -> list[Transfer]:
    """Transfers that together deliver ``box`` once to ``target``. Adds to ``num_sent``."""
    found: list[Transfer] = []
    missing = [box]
    own_first = sorted(holders, key=lambda held: target not in holders[held])
    for held in own_first:
        ranks = holders[held]
        rest: list[Box] = []
        for part in missing:
            common = part.intersect(held)
            if common is None:
                rest.append(part)
                continue
            source = target if target in ranks else min(ranks, key=lambda rank: (num_sent[rank], rank))
            if source != target:
                num_sent[source] += common.num_elements
            found.append(Transfer(name=name, box=common, source=source, target=target))
            rest.extend(part.subtract(held))
        missing = rest
        if not missing:
            return found
    raise WeightError(
        f"no rank holds {name}{[list(r) for r in missing[0].ranges]}, which rank {target} needs"
    )
