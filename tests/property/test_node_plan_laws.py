"""Laws of plans for ranks on nodes: each needed element arrives once, and no rank or node gets a byte more
than it must.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.models.boxes import Box
from mtrl.models.transfers import Boxes, Transfer
from mtrl.parallel.errors import WeightError
from mtrl.weight_push import flows
from mtrl.weight_push.flows import Alike
from mtrl.weight_push.nodes import Group, NodePlan, Traffic, plan_alike, plan_nodes
from tests.property.node_bounds import check_plan

pytestmark = pytest.mark.one_stack

SHAPE = (7, 6)


@st.composite
def tilings(draw: st.DrawFn, box: Box, cuts: int = 3) -> list[Box]:
    """``box`` in disjoint boxes that lie anyhow."""
    parts = [box]
    for _ in range(draw(st.integers(0, cuts))):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(part.ranges) - 1))
        start, stop = part.ranges[dim]
        edge = draw(st.integers(start, stop))
        for piece in ((start, edge), (edge, stop)):
            if piece[0] < piece[1]:
                parts.append(Box((*part.ranges[:dim], piece, *part.ranges[dim + 1 :])))
    return parts


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Boxes], list[Boxes], list[int]]:
    """What ranks of some nodes have, all of it held somewhere, and what they need."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    node_of = draw(st.permutations([node for node, size in enumerate(sizes) for _ in range(size)]))
    have: list[dict[str, tuple[Box, ...]]] = [{} for _ in node_of]
    need: list[dict[str, tuple[Box, ...]]] = [{} for _ in node_of]
    ranks = st.integers(0, len(node_of) - 1)
    for name in "ab":
        for copy in range(draw(st.integers(1, 3))):
            for box in draw(tilings(Box.full(SHAPE))):
                for rank in draw(st.sets(ranks, min_size=0 if copy else 1, max_size=3)):
                    have[rank][name] = (*have[rank].get(name, ()), box)
        for rank in draw(st.sets(ranks)):
            parts = draw(tilings(Box.full(SHAPE)))
            need[rank][name] = tuple(part for part in parts if draw(st.booleans()))
    return list(have), list(need), node_of


@settings(deadline=None)
@given(worlds(), st.sampled_from([1, 7, 10**9]))
def test_every_needed_element_arrives_once_and_nothing_more(
    world: tuple[list[Boxes], list[Boxes], list[int]], largest: int
) -> None:
    have, need, node_of = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows, "LARGEST_BYTES", largest)
        plan = plan_nodes("ab", have, need, node_of)
        check_plan(plan, {"a": SHAPE, "b": SHAPE}, have, need, node_of)
        alike = [tensors(name, have, need) for name in "ab"]
        traffic = plan_alike(alike, node_of, "ab", ())[1]
        own = [plan_alike(alike, node_of, "ab", [rank])[0] for rank in range(len(node_of))]
        everyones = plan_alike(alike, node_of, "ab", range(len(node_of)))[0]
    check_counts(everyones, traffic, node_of)
    for rank, each in enumerate(own):
        for mine, all_ in ((each.first, everyones.first), (each.forwarded, everyones.forwarded)):
            assert mine.transfers == tuple(t for t in all_.transfers if rank in (t.source, t.target))


def tensors(name: str, have: Sequence[Boxes], need: Sequence[Boxes]) -> Alike:
    sides = [
        {
            box: tuple(rank for rank, each in enumerate(side) if box in each.get(name, ()))
            for box in sorted({box for each in side for box in each.get(name, ())}, key=lambda b: b.ranges)
        }
        for side in (have, need)
    ]
    return Alike(names=(name,), have=sides[0], need=sides[1])


def check_counts(plan: NodePlan, traffic: Traffic, node_of: Sequence[int]) -> None:
    """The counted traffic is that of the transfers."""
    found = Traffic.none(len(node_of))
    for each in (*plan.first.transfers, *plan.forwarded.transfers):
        size = each.box.num_elements
        if each.source == each.target:
            found.local[each.source] += size
        elif node_of[each.source] == node_of[each.target]:
            found.sent_inside[each.source] += size
            found.received_inside[each.target] += size
        else:
            found.sent_across[each.source] += size
            found.received_across[each.target] += size
    for name in ("local", "sent_across", "received_across", "sent_inside", "received_inside"):
        assert np.array_equal(getattr(traffic, name), getattr(found, name)), name


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(1, 30),
    st.integers(1, 9),
)
def test_shares_are_as_level_as_boxes_dealt_one_by_one_to_the_least_loaded(
    loads: list[list[int]], count: int, num_bytes: int
) -> None:
    node_of = np.repeat(np.arange(len(loads)), [len(each) for each in loads])
    load = np.array([number for each in loads for number in each])
    group = Group.of(np.arange(len(load)), node_of, load)
    shares = np.zeros(len(load), np.int64)
    shares[group.ranks] = group.levelled(count, num_bytes, load)
    assert shares.min() >= 0
    for node, dealt in enumerate(loads):
        own = node_of == node
        assert shares[own].sum() == count
        dealt = list(dealt)
        for _ in range(count):
            dealt[dealt.index(min(dealt))] += num_bytes
        if len(dealt) > 1:
            assert sorted((load + shares * num_bytes)[own]) == sorted(dealt)


WHOLE = Box.full((8,))


def test_what_a_whole_node_needs_crosses_once_and_is_shared_out() -> None:
    names = [str(number) for number in range(8)]
    have: list[Boxes] = [dict.fromkeys(names, (WHOLE,))] * 4 + [{}] * 4
    need: list[Boxes] = [{}] * 4 + [dict.fromkeys(names, (WHOLE,))] * 4
    plan = plan_nodes(names, have, need, [0] * 4 + [1] * 4)
    across = plan.first.transfers
    assert [t.name for t in across] == names  # each tensor once
    for ranks, end in ((range(4), "source"), (range(4, 8), "target")):
        assert sorted(getattr(t, end) for t in across) == sorted([*ranks, *ranks])
    assert len(plan.forwarded.transfers) == 3 * 8
    assert {t.source for t in plan.forwarded.transfers} == {4, 5, 6, 7}


def test_a_rank_s_own_comes_before_its_node_s_before_another_s() -> None:
    held: Boxes = {"w": (WHOLE,)}
    plan = plan_nodes("w", [held, {}, held, {}], [{}, held, held, held], [0, 0, 1, 1])
    assert plan.first.transfers == (
        Transfer(name="w", box=WHOLE, source=0, target=1),
        Transfer(name="w", box=WHOLE, source=2, target=2),
        Transfer(name="w", box=WHOLE, source=2, target=3),
    )
    assert plan.forwarded.transfers == ()


def test_one_large_tensor_is_sent_and_received_by_all_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "LARGEST_BYTES", 2)
    held: Boxes = {"w": (WHOLE,)}
    plan = plan_nodes("w", [held] * 4 + [{}] * 4, [{}] * 4 + [held] * 4, [0] * 4 + [1] * 4)
    assert {(t.source, t.target) for t in plan.first.transfers} == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_an_element_that_nobody_holds_is_refused_with_its_place() -> None:
    half: Boxes = {"w": (Box(((0, 4),)),)}
    with pytest.raises(WeightError) as raised:
        plan_nodes("w", [half, {}], [{}, {"w": (WHOLE,)}], [0, 1])
    assert str(raised.value) == "no rank holds w[[4, 8]], which rank 1 needs"
