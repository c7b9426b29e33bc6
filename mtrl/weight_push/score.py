"""What a push from one layout to another must move at least, without planning it. Pure.

A rank must receive need(r) minus have(r); a node, need(n) minus have(n) of the unions over its ranks. `score`
computes both from the ranges of ``kinds.py``, a few numbers a kind and rank, so that many rollout layouts can
be compared; the plan of ``nodes.py`` meets both, and tests hold the two against each other. Bytes are those
of the kinds, FP8's scales among them (``fp8_kinds.py``), without what ranks tell each other to find scales.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mtrl.models.boxes import Range
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.weight_push.kinds import Engines, Kind
from mtrl.weight_push.nodes import Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Bytes of one push: what each rank's engine shard needs, what each rank and each node must receive."""

    engines: Engines
    needed: Numbers
    received: Numbers
    into_nodes: Numbers

    @property
    def local_share(self) -> float:
        """Which part of what is needed is on its rank already."""
        return 1 - float(self.received.sum()) / float(self.needed.sum())


def score(kinds: Sequence[Kind], layout: RankLayout, engines: Engines, gpus_per_node: int) -> Score:
    """Of kinds that were made for this layout and these engines."""
    places = _Places.of(layout, engines, gpus_per_node)
    num_nodes = int(places.node.max()) + 1
    needed, local = (np.zeros(layout.world_size, np.int64) for _ in range(2))
    into_nodes = np.zeros(num_nodes, np.int64)
    for kind, num_bytes in _merged(kinds).values():
        spread = _Spread.of(kind, places)
        needed += spread.needed() * num_bytes
        local += spread.local() * num_bytes
        into_nodes += spread.into_nodes(places.node, num_nodes) * num_bytes
    return Score(engines=engines, needed=needed, received=needed - local, into_nodes=into_nodes)


def compare(
    kinds_for: Callable[[Engines], Sequence[Kind]], layout: RankLayout, engines: Engines, gpus_per_node: int
) -> list[Score]:
    """Every rollout layout of the same world but those for which ``kinds_for`` raises LayoutError,
    ``engines`` among them; the fewest bytes first: by the rank that receives most, then by the node.
    """
    found = []
    for tp in range(1, layout.world_size + 1):
        for expert_parallel in (False, True) if layout.world_size % tp == 0 else ():
            spec = replace(engines.spec, dp=layout.world_size // tp, tp=tp)
            each = Engines(spec=spec, expert_parallel=expert_parallel)
            if expert_parallel and tp == 1:
                continue  # the same as without
            try:
                kinds = kinds_for(each)
            except LayoutError:
                continue
            found.append(score(kinds, layout, each, gpus_per_node))
    return sorted(found, key=lambda each: (each.received.max(), each.into_nodes.max(), each.engines.spec.tp))


def _merged(kinds: Sequence[Kind]) -> dict[object, tuple[Kind, int]]:
    """Kinds that are split alike as one, with the bytes of one index of ``dim`` of one expert of all."""
    found: dict[object, tuple[Kind, int]] = {}
    for kind in kinds:
        stages = tuple((rank, len(layers)) for rank, layers in kind.stages.items())
        ranges = (kind.trainer, kind.trainer_experts, kind.engine, kind.engine_experts)
        key = (kind.is_per_layer, kind.num_experts, stages, ranges)
        num_bytes = kind.unit * kind.itemsize
        found[key] = (kind, num_bytes + (found[key][1] if key in found else 0))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where each rank stands."""

    pp: Numbers
    tp: Numbers
    ep: Numbers
    etp: Numbers
    engine: Numbers
    node: Numbers

    @classmethod
    def of(cls, layout: RankLayout, engines: Engines, gpus_per_node: int) -> "_Places":
        ranks = [layout.coordinates(rank) for rank in range(layout.world_size)]
        numbers = np.arange(layout.world_size)
        return cls(
            pp=np.array([at.pp for at in ranks]),
            tp=np.array([at.tp for at in ranks]),
            ep=np.array([at.ep for at in ranks]),
            etp=np.array([at.etp for at in ranks]),
            engine=numbers % engines.spec.tp,
            node=numbers // gpus_per_node,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spread:
    """One kind over all ranks: ``have`` and ``need`` are [rank, (slice, experts), (start, stop)].

    ``held`` is how many tensors (of each expert) a rank holds its part of, ``total`` how many there are.
    Ranks of equal ``group`` hold the same ones.
    """

    have: Numbers
    need: Numbers
    held: Numbers
    total: int
    group: Numbers

    @classmethod
    def of(cls, kind: Kind, at: _Places) -> "_Spread":
        """Ranges without experts are those of one."""

        def experts(ranges: Sequence[Range]) -> NDArray[np.int64]:
            return np.array(ranges if kind.num_experts else [(0, 1)] * len(ranges))

        slices, groups = (at.etp, at.ep) if kind.num_experts else (at.tp, 0 * at.tp)
        counts = np.zeros(int(at.pp.max()) + 1, np.int64)
        for stage, layers in kind.stages.items():
            counts[stage] = len(layers)
        return cls(
            have=np.stack([np.array(kind.trainer)[slices], experts(kind.trainer_experts)[groups]], axis=1),
            need=np.stack(
                [np.array(kind.engine)[at.engine], experts(kind.engine_experts)[at.engine]], axis=1
            ),
            held=counts[at.pp],
            total=len({layer for layers in kind.stages.values() for layer in layers}),
            group=at.pp if kind.is_per_layer else 0 * at.pp,
        )

    def needed(self) -> Numbers:
        """Indices that each rank needs, of all tensors."""
        volume: Numbers = (self.need[:, :, 1] - self.need[:, :, 0]).prod(axis=1) * self.total
        return volume

    def local(self) -> Numbers:
        """Indices that each rank needs and has."""
        start = np.maximum(self.have[:, :, 0], self.need[:, :, 0])
        stop = np.minimum(self.have[:, :, 1], self.need[:, :, 1])
        volume: Numbers = (stop - start).clip(min=0).prod(axis=1) * self.held
        return volume

    def into_nodes(self, node: Numbers, num_nodes: int) -> Numbers:
        """Indices that each node's ranks need and none of them has."""
        both = np.concatenate([self.have, self.need])
        edges = [np.unique(both[:, axis]) for axis in (0, 1)]
        sizes = np.multiply.outer(np.diff(edges[0]), np.diff(edges[1]))
        seen: dict[bytes, Cells] = {}
        lacking = np.zeros(num_nodes, np.int64)
        for key, ranks in _members(node):
            need = _cells(self.need[ranks], edges, seen)
            lacking[key] += int(sizes[need].sum()) * self.total
            for group in np.unique(self.group[ranks]):
                holders = ranks[(self.group[ranks] == group) & (self.held[ranks] > 0)]
                if len(holders):
                    have = _cells(self.have[holders], edges, seen)
                    lacking[key] -= int(sizes[need & have].sum()) * int(self.held[holders[0]])
        return lacking


Cells = NDArray[np.bool_]


def _cells(ranges: Numbers, edges: Sequence[Numbers], seen: dict[bytes, Cells]) -> Cells:
    """Which cells between ``edges`` lie in one of the ranges; ``seen`` are those that were asked for
    before.
    """
    key = ranges.tobytes()
    if key not in seen:
        found = np.zeros([len(each) - 1 for each in edges], np.bool_)
        slices = np.searchsorted(edges[0], ranges[:, 0])
        experts = np.searchsorted(edges[1], ranges[:, 1])
        for a, b, c, d in {
            (*one, *other) for one, other in zip(slices.tolist(), experts.tolist(), strict=True)
        }:
            found[a:b, c:d] = True
        seen[key] = found
    return seen[key]


def _members(node: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Each node with its ranks; ranks of a node follow each other."""
    edges = np.flatnonzero(np.diff(node, prepend=-1, append=-1))
    for start, stop in itertools.pairwise(edges):
        yield int(node[start]), np.arange(start, stop)
