"""A plan as rounds, through buckets between ranks: views of these and of live tensors."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from mtrl.models.boxes import Box
from mtrl.models.transfers import Transfer
from mtrl.rollout.kernel_layout import PackBlocks
from mtrl.weight_push.copies import Copies
from mtrl.weight_push.nodes import NodePlan
from mtrl.weight_push.transport import CollectiveTransport, RoundSizes, Wire
from mtrl.weight_push.turns import packed
from mtrl.weight_push.views import Look, View, matched


class Sides(Protocol):
    """Views of live tensors on both sides of an exchange: see `Views`."""

    def held(self, name: str, box: Box) -> View:
        """What this rank has."""

    def wanted(self, name: str, box: Box) -> View:
        """Where it wants what it receives."""

    def delivered(self, name: str, box: Box) -> View:
        """As ``wanted``, and each element once."""


@dataclass(slots=True, kw_only=True)
class Round:
    """A step that ranks take together: copies, an exchange, and copies that need it made."""

    exchange: Callable[[], Sequence[int]]
    """Collective over WORLD; bytes that have come from each rank."""
    before: Copies = field(default_factory=Copies)
    after: Copies = field(default_factory=Copies)


@dataclass(slots=True, kw_only=True)
class Rounds:
    """A push: copies on this rank itself, and rounds in their order."""

    local: Copies = field(default_factory=Copies)
    rounds: list[Round] = field(default_factory=list)


def make_rounds(
    plan: NodePlan,
    views: Sides,
    *,
    transport: CollectiveTransport,
    dtype_of: Callable[[str], torch.dtype],
    rank: int,
    world_size: int,
    bucket_bytes: int,
    device: torch.device,
    pack: PackBlocks | None = None,
) -> Rounds:
    """The plan by way of buckets, cut so that no rank sends or receives more than ``bucket_bytes`` a round.

    A tensor larger than that has a round of its own; ``pack`` writes what it is faster with.
    """
    cut: list[tuple[list[Transfer], Look]] = []
    for stage, read in ((plan.first, views.held), (plan.forwarded, views.delivered)):
        for dtype in dict.fromkeys(dtype_of(each.name) for each in stage.transfers):
            same = [each for each in stage.transfers if dtype_of(each.name) == dtype]
            travelling = [each for each in same if each.source != each.target]
            cut += [(group, read) for group in _cut(travelling, world_size, bucket_bytes // dtype.itemsize)]
    wires = transport.open(
        [RoundSizes(_sizes(group, world_size), dtype_of(group[0].name)) for group, _ in cut], device
    )
    rounds = [
        _round(group, views, read, wire, partial(transport.exchange, wire), rank, pack)
        for (group, read), wire in zip(cut, wires, strict=True)
    ]
    return Rounds(local=local_copies(plan, views, rank, pack), rounds=rounds)


def local_copies(plan: NodePlan, views: Sides, rank: int, pack: PackBlocks | None) -> Copies:
    """What a rank needs and has itself."""
    found = Copies()
    for each in plan.first.transfers:
        if each.source == each.target == rank:
            found.extend(matched(views.held, views.wanted, each.name, each.box))
    return packed(found.coalesced(), pack)


def _cut(transfers: Sequence[Transfer], world_size: int, limit: int) -> Iterator[list[Transfer]]:
    """In runs of whole tensors; ``limit`` counts elements of one rank in one direction."""
    group: list[Transfer] = []
    load = [0] * (2 * world_size)
    for _, run in itertools.groupby(transfers, key=lambda transfer: transfer.name):
        members = list(run)
        added = [0] * (2 * world_size)
        for each in members:
            added[each.source] += each.box.num_elements
            added[world_size + each.target] += each.box.num_elements
        if group and any(a + b > limit for a, b in zip(load, added, strict=True)):
            yield group
            group, load = [], [0] * (2 * world_size)
        load = [a + b for a, b in zip(load, added, strict=True)]
        group += members
    if group:
        yield group


def _sizes(transfers: Sequence[Transfer], world_size: int) -> tuple[tuple[int, ...], ...]:
    found = [[0] * world_size for _ in range(world_size)]
    for each in transfers:
        found[each.source][each.target] += each.box.num_elements
    return tuple(map(tuple, found))


def _round(
    transfers: Sequence[Transfer],
    views: Sides,
    read: Look,
    wire: Wire,
    exchange: Callable[[], Sequence[int]],
    rank: int,
    pack: PackBlocks | None,
) -> Round:
    found = Round(exchange=exchange)
    start = 0
    for each in sorted((t for t in transfers if t.source == rank), key=lambda t: t.target):
        bucket = wire.sent[start : (start := start + each.box.num_elements)].view(each.box.shape)
        for part, source in read(each.name, each.box):
            found.before.add(bucket[part.relative_to(each.box).slices], source)
    starts = [0] * len(wire.received)
    for each in transfers:
        if each.target == rank:
            start, starts[each.source] = starts[each.source], starts[each.source] + each.box.num_elements
            bucket = wire.received[each.source][start : starts[each.source]].view(each.box.shape)
            for part, target in views.wanted(each.name, each.box):
                found.after.add(target, bucket[part.relative_to(each.box).slices])
    found.before = found.before.coalesced()
    found.after = packed(found.after.coalesced(), pack)
    return found
