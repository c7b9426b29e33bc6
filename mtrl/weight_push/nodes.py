"""Who sends what to whom when ranks stand on nodes: nothing crosses a node's network card twice. Pure.

A needed element comes from one source: the rank itself if it has it, else a rank of its node that has it,
else another node, and then one of the node's ranks that need it receives it and forwards it to the others. So
rank r receives exactly need(r) minus have(r), whoever forwards included, and node n receives from other nodes
exactly need(n) minus have(n), the unions over its ranks: both lower bounds are met at once.

Everything is planned by flows (``flows.py``), those that fewer ranks need first: what only one rank of a node
can receive is then known when what several can is shared out so that their loads come out level. Senders take
turns, the least loaded first. Any rank can name its own transfers without looking at the others'.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mtrl.models.boxes import Box
from mtrl.models.transfers import Boxes, Transfer, TransferPlan
from mtrl.weight_push.flows import Alike, Flow, Ranks, flows_of

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """Two exchanges, one after the other.

    In the first every source reads its trainer's weights: between nodes, within a node, and copies on a rank
    itself. In the second, within nodes only, every source reads what the first has brought it.
    """

    first: TransferPlan
    forwarded: TransferPlan

    def received(self, world_size: int) -> list[int]:
        """Elements that each rank receives from other ranks."""
        found = [0] * world_size
        for each in (*self.first.transfers, *self.forwarded.transfers):
            if each.source != each.target:
                found[each.target] += each.box.num_elements
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of each rank, counted flow by flow: copied on it, and sent and received by where they go."""

    local: Numbers
    sent_across: Numbers
    received_across: Numbers
    sent_inside: Numbers
    received_inside: Numbers

    @classmethod
    def none(cls, world_size: int) -> "Traffic":
        """No bytes yet."""
        return cls(
            local=np.zeros(world_size, np.int64),
            sent_across=np.zeros(world_size, np.int64),
            received_across=np.zeros(world_size, np.int64),
            sent_inside=np.zeros(world_size, np.int64),
            received_inside=np.zeros(world_size, np.int64),
        )

    @property
    def received(self) -> Numbers:
        """From other ranks, wherever they are."""
        return self.received_across + self.received_inside

    def into_nodes(self, node_of: Sequence[int]) -> Numbers:
        """What each node receives from other nodes."""
        return np.bincount(np.asarray(node_of), weights=self.received_across).astype(np.int64)


def plan_nodes(
    names: Sequence[str],
    have: Sequence[Boxes],
    need: Sequence[Boxes],
    node_of: Sequence[int],
    *,
    itemsize: int = 1,
) -> NodePlan:
    """All ranks' transfers; arguments as `plan_transfers`, the node of each rank, and an element's bytes.

    Raises:
        WeightError: some needed element is held by no rank.
    """
    alike: dict[tuple[object, object], list[str]] = {}
    sides: dict[tuple[object, object], tuple[dict[Box, Ranks], dict[Box, Ranks]]] = {}
    for name in names:
        by_box = (_ranks_by_box(name, have), _ranks_by_box(name, need))
        key = (tuple(by_box[0].items()), tuple(by_box[1].items()))
        alike.setdefault(key, []).append(name)
        sides[key] = by_box
    tensors = [
        Alike(names=tuple(members), have=sides[key][0], need=sides[key][1], itemsize=itemsize)
        for key, members in alike.items()
    ]
    return plan_alike(tensors, node_of, names, range(len(have)))[0]


def plan_alike(
    tensors: Iterable[Alike], node_of: Sequence[int], names: Sequence[str], ranks: Collection[int]
) -> tuple[NodePlan, Traffic]:
    """The transfers to and from ``ranks``, in the order of ``names``; and the traffic of every rank.

    Every rank that is asked for the same ``tensors`` and ``node_of`` plans the same, whatever ``ranks``.

    Raises:
        WeightError: some needed element is held by no rank.
    """
    traffic = Traffic.none(len(node_of))
    first: list[Transfer] = []
    forwarded: list[Transfer] = []
    nodes, asked = np.asarray(node_of, np.int64), set(ranks)
    for flow in sorted(flows_of(tensors), key=lambda flow: len(flow.needers)):
        turns = Turns.of(flow, nodes, traffic)
        for rank in sorted(asked.intersection(flow.holders) | asked.intersection(flow.needers)):
            for is_forward, transfer in turns.arriving(rank):
                (forwarded if is_forward else first).append(transfer)
            if len(asked) == len(nodes):
                continue  # what leaves one rank has arrived at another
            for is_forward, transfer in turns.leaving(rank):
                if transfer.target not in asked:
                    (forwarded if is_forward else first).append(transfer)
    position = {name: index for index, name in enumerate(names)}

    def on_the_wire(each: Transfer) -> tuple[object, ...]:
        return position[each.name], each.box.ranges, each.target

    first.sort(key=on_the_wire)
    forwarded.sort(key=on_the_wire)
    plan = NodePlan(
        first=TransferPlan(transfers=tuple(first)), forwarded=TransferPlan(transfers=tuple(forwarded))
    )
    return plan, traffic


def _ranks_by_box(name: str, boxes: Sequence[Boxes]) -> dict[Box, Ranks]:
    found: dict[Box, list[int]] = {}
    for rank, held in enumerate(boxes):
        for box in held.get(name, ()):
            found.setdefault(box, []).append(rank)
    return {box: tuple(found[box]) for box in sorted(found, key=lambda box: box.ranges)}


# ---- whose turn ----


@dataclass
class Group:
    """Ranks that take turns: ``ranks[start : start + size]`` of each node, in that order."""

    ranks: Numbers
    nodes: Numbers
    start: Numbers
    size: Numbers

    @classmethod
    def of(cls, ranks: Numbers, node_of: Numbers, load: Numbers) -> "Group":
        """By node, the least loaded of each first."""
        ordered = ranks[np.lexsort((ranks, load[ranks], node_of[ranks]))]
        at = node_of[ordered]
        begins = np.ones(len(at), np.bool_)
        begins[1:] = at[1:] != at[:-1]
        start = begins.nonzero()[0]
        size = np.empty(len(start), np.int64)
        size[:-1] = start[1:] - start[:-1]
        size[-1:] = len(at) - start[-1:]
        return cls(ordered, at[start], start, size)

    @cached_property
    def index(self) -> dict[int, int]:
        """Node to its place in ``nodes``, ``start`` and ``size``."""
        return {int(node): place for place, node in enumerate(self.nodes)}

    def of_node(self, place: int) -> list[int]:
        """The ranks of the node at this place, in turn."""
        start = int(self.start[place])
        return [int(rank) for rank in self.ranks[start : start + int(self.size[place])]]

    def turns(self, jobs: Numbers) -> Numbers:
        """How many of the ``jobs`` of its node, dealt out in turn, each of ``ranks`` gets."""
        size = np.repeat(self.size, self.size)
        behind = np.arange(len(self.ranks)) - np.repeat(self.start, self.size)
        shares: Numbers = (np.repeat(jobs, self.size) - behind + size - 1) // size
        return shares

    def levelled(self, count: int, num_bytes: int, load: Numbers) -> Numbers:
        """How many of ``count`` boxes of its node each of ``ranks`` gets for the loads to end up as level as
        they can.

        Whole numbers throughout: every rank, on whatever machine, must come to the same.
        """
        if len(self.ranks) == len(self.nodes):
            return np.full(len(self.ranks), count)
        row = np.repeat(np.arange(len(self.nodes)), self.size)
        column = np.arange(len(self.ranks)) - np.repeat(self.start, self.size)
        loads = np.zeros((len(self.nodes), int(self.size.max())), np.int64)
        loads[row, column] = load[self.ranks]
        ways = np.arange(1, loads.shape[1] + 1)
        # With the first `ways` ranks, the least loaded, filled to one level, this is `ways` times that level.
        levels = loads.cumsum(axis=1) + count * num_bytes
        takes = (ways <= self.size[:, None]) & (loads * ways < levels)
        most = takes.sum(axis=1)
        level = levels[np.arange(len(most)), most - 1]
        shares = (level[:, None] - loads * most[:, None]) // (num_bytes * most[:, None]) * takes
        reached = np.where(takes, loads + shares * num_bytes, np.iinfo(np.int64).max)
        place = reached.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        shares += place < (count - shares.sum(axis=1))[:, None]
        found: Numbers = shares[row, column]
        return found


@dataclass
class Turns:
    """Who takes which box of one flow: a node's receivers take their shares one after the other; box k of
    node number j is sent by sender ``(j * count + k) mod len(senders)``.
    """

    flow: Flow
    node_of: Numbers
    senders: list[int]
    """Holders, in turn, for other nodes."""
    receivers: Group
    """Of nodes that have no holder: the ranks that need the flow."""
    shares: Numbers
    """How many boxes each of those receives from other nodes."""
    lacking: Group
    """Of nodes that have holders: the ranks that need the flow and are none."""
    holders: Group
    """Of those nodes, and others, the holders; nobody where no rank is lacking."""

    @classmethod
    def of(cls, flow: Flow, node_of: Numbers, traffic: Traffic) -> "Turns":
        """Given the traffic so far, to which this flow's is added."""
        holders, needers = np.asarray(flow.holders, np.int64), np.asarray(flow.needers, np.int64)
        has = np.zeros(len(node_of), np.bool_)
        has[holders] = True
        count, size = flow.count, flow.num_bytes
        traffic.local[needers[has[needers]]] += count * size
        lacking = needers[~has[needers]]
        nobody = lacking[:0]
        served = np.zeros(int(node_of.max()) + 1, np.bool_)
        served[node_of[holders]] = True
        inside = served[node_of[lacking]]
        receivers = Group.of(lacking[~inside], node_of, traffic.received_across)
        found = cls(
            flow,
            node_of,
            [int(rank) for rank in holders[np.lexsort((holders, traffic.sent_across[holders]))]],
            receivers,
            receivers.levelled(count, size, traffic.received_across),
            Group.of(lacking[inside], node_of, traffic.received_inside),
            Group.of(holders if inside.any() else nobody, node_of, traffic.sent_inside),
        )
        found._count_across(traffic)
        found._count_inside(traffic)
        return found

    def _count_across(self, traffic: Traffic) -> None:
        count, size, group, shares = self.flow.count, self.flow.num_bytes, self.receivers, self.shares
        if not len(group.ranks):
            return
        whole, rest = divmod(len(group.nodes) * count, len(self.senders))
        traffic.sent_across[self.senders] += whole * size
        traffic.sent_across[self.senders[:rest]] += size
        traffic.received_across[group.ranks] += shares * size
        traffic.sent_inside[group.ranks] += shares * size * (np.repeat(group.size, group.size) - 1)
        traffic.received_inside[group.ranks] += (count - shares) * size

    def _count_inside(self, traffic: Traffic) -> None:
        count, size, group = self.flow.count, self.flow.num_bytes, self.lacking
        if not len(group.ranks):
            return
        traffic.received_inside[group.ranks] += count * size
        jobs = np.zeros(len(self.holders.nodes), np.int64)
        jobs[np.searchsorted(self.holders.nodes, group.nodes)] = group.size * count
        traffic.sent_inside[self.holders.ranks] += self.holders.turns(jobs).clip(min=0) * size

    def receiving(self, place: int) -> list[int]:
        """The receiver of each box in the node at this place."""
        start = int(self.receivers.start[place])
        own = slice(start, start + int(self.receivers.size[place]))
        return [int(rank) for rank in np.repeat(self.receivers.ranks[own], self.shares[own])]

    @cached_property
    def boxes(self) -> list[tuple[str, Box]]:
        """Each box of the flow with its tensor."""
        return [(name, box) for names, box in self.flow.parts for name in names]

    def arriving(self, rank: int) -> Iterator[tuple[bool, Transfer]]:
        """What ``rank`` gets, with whether it is forwarded."""
        if rank not in self.flow.needers:
            return
        count, node = self.flow.count, int(self.node_of[rank])
        if rank in self.flow.holders:
            for box in range(count):
                yield False, self._transfer(box, rank, rank)
        elif node in self.receivers.index:
            place = self.receivers.index[node]
            for box, receiver in enumerate(self.receiving(place)):
                sender = self.senders[(place * count + box) % len(self.senders)]
                yield receiver != rank, self._transfer(box, sender if receiver == rank else receiver, rank)
        else:
            turn = self.holders.of_node(self.holders.index[node])
            job = self.lacking.of_node(self.lacking.index[node]).index(rank) * count
            for box in range(count):
                yield False, self._transfer(box, turn[(job + box) % len(turn)], rank)

    def leaving(self, rank: int) -> Iterator[tuple[bool, Transfer]]:
        """What ``rank`` sends to others, with whether it forwards it."""
        count, node = self.flow.count, int(self.node_of[rank])
        if rank in self.flow.holders:
            first = self.senders.index(rank)
            receiving = [self.receiving(place) for place in range(len(self.receivers.nodes))]
            for job in range(first, len(self.receivers.nodes) * count, len(self.senders)):
                place, box = divmod(job, count)
                yield False, self._transfer(box, rank, receiving[place][box])
            if node in self.lacking.index:
                targets = self.lacking.of_node(self.lacking.index[node])
                turn = self.holders.of_node(self.holders.index[node])
                for job in range(turn.index(rank), len(targets) * count, len(turn)):
                    target, box = divmod(job, count)
                    yield False, self._transfer(box, rank, targets[target])
        elif rank in self.flow.needers and node in self.receivers.index:
            turn = self.receivers.of_node(self.receivers.index[node])
            for box, receiver in enumerate(self.receiving(self.receivers.index[node])):
                for target in turn if receiver == rank else ():
                    if target != rank:
                        yield True, self._transfer(box, rank, target)

    def _transfer(self, box: int, source: int, target: int) -> Transfer:
        name, part = self.boxes[box]
        return Transfer(name=name, box=part, source=source, target=target)
