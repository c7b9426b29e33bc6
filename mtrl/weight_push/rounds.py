"""A plan as rounds: for each, views of live tensors and of the buckets between ranks."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mtrl.models.boxes import Box
from mtrl.models.transfers import Transfer
from mtrl.rollout.kernel_layout import PackBlocks
from mtrl.weight_push.copies import Copies
from mtrl.weight_push.nodes import NodePlan
from mtrl.weight_push.transport import RoundSizes, Transport, Wire
from mtrl.weight_push.turns import packed

Read = Callable[[str, Box], Iterator[tuple[Box, Tensor]]]


class Sides(Protocol):
    """Views of live tensors on both sides of an exchange: see `Views`."""

    def held(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """What this rank has."""

    def wanted(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Where it wants what it receives."""

    def delivered(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """As ``wanted``, and each element once."""

    def matched(self, name: str, box: Box) -> Iterator[tuple[Tensor, Tensor]]:
        """(target, source) of what it has itself."""


@dataclass(slots=True, kw_only=True)
class Round:
    """What travels together: ``outgoing`` fill the wire's buckets, ``incoming`` empty them."""

    wire: Wire
    outgoing: Copies = field(default_factory=Copies)
    incoming: Copies = field(default_factory=Copies)


@dataclass(slots=True, kw_only=True)
class Rounds:
    """A push: copies on this rank itself, and rounds in their order."""

    local: Copies = field(default_factory=Copies)
    rounds: list[Round] = field(default_factory=list)


def make_rounds(
    plan: NodePlan,
    views: Sides,
    *,
    transport: Transport,
    dtype_of: Callable[[str], torch.dtype],
    rank: int,
    world_size: int,
    bucket_bytes: int,
    device: torch.device,
    pack: PackBlocks | None = None,
) -> Rounds:
    """The plan as views, cut by tensors so that no rank sends or receives more than ``bucket_bytes`` a round.

    A tensor larger than that has a round of its own; ``pack`` writes what it is faster with. Collective over
    WORLD.
    """  # fmt: skip
    cut: list[tuple[list[Transfer], Read]] = []
    for stage, read in ((plan.first, views.held), (plan.forwarded, views.delivered)):
        for dtype in dict.fromkeys(dtype_of(each.name) for each in stage.transfers):
            same = [each for each in stage.transfers if dtype_of(each.name) == dtype]
            travelling = [each for each in same if each.source != each.target]
            cut += [(group, read) for group in _cut(travelling, world_size, bucket_bytes // dtype.itemsize)]
    wires = transport.open(
        [RoundSizes(_sizes(group, world_size), dtype_of(group[0].name)) for group, _ in cut], device
    )
    rounds = [
        _round(group, views, read, wire, rank, pack) for (group, read), wire in zip(cut, wires, strict=True)
    ]
    local = Copies()
    for each in plan.first.transfers:
        if each.source == each.target == rank:
            for target, source in views.matched(each.name, each.box):
                local.add(target, source)
    return Rounds(local=packed(local.coalesced(), pack), rounds=rounds)


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
    transfers: Sequence[Transfer], views: Sides, read: Read, wire: Wire, rank: int, pack: PackBlocks | None
) -> Round:
    found = Round(wire=wire)
    start = 0
    for each in sorted((t for t in transfers if t.source == rank), key=lambda t: t.target):
        bucket = wire.sent[start : (start := start + each.box.num_elements)].view(each.box.shape)
        for part, source in read(each.name, each.box):
            found.outgoing.add(bucket[part.relative_to(each.box).slices], source)
    starts = [0] * len(wire.received)
    for each in transfers:
        if each.target == rank:
            start, starts[each.source] = starts[each.source], starts[each.source] + each.box.num_elements
            bucket = wire.received[each.source][start : starts[each.source]].view(each.box.shape)
            for part, target in views.wanted(each.name, each.box):
                found.incoming.add(target, bucket[part.relative_to(each.box).slices])
    found.outgoing = found.outgoing.coalesced()
    found.incoming = packed(found.incoming.coalesced(), pack)
    return found
