"""Laws of rank layouts."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import (
    ATTN_AXES,
    FFN_AXES,
    ROLLOUT_AXES,
    AxisName,
    Groups,
    RankLayout,
    RolloutLayout,
    check_world_size,
)
from mtrl.parallel.spec import ParallelSpec, RolloutSpec, parse_spec
from tests.property.strategies import rollout_specs, training_specs

SIDES = st.sampled_from([ATTN_AXES, FFN_AXES])
layouts = st.builds(RankLayout.from_spec, training_specs())


def assert_partition(groups: Groups, world_size: int, group_size: int) -> None:
    assert sorted(rank for group in groups for rank in group) == list(range(world_size))
    assert {len(group) for group in groups} == {group_size}
    assert all(list(group) == sorted(group) for group in groups)
    assert list(groups) == sorted(groups)


@given(layouts)
def test_groups_of_each_axis_partition_the_world(layout: RankLayout) -> None:
    for axis in ATTN_AXES + FFN_AXES:
        assert_partition(layout.groups(axis), layout.world_size, layout.size(axis))


@given(layouts, SIDES, st.data())
def test_joint_groups_partition_the_world_and_are_unions_of_their_axes_groups(
    layout: RankLayout, side: tuple[AxisName, ...], data: st.DataObject
) -> None:
    axes = data.draw(st.lists(st.sampled_from(side), min_size=1, unique=True))
    joint = layout.product_groups(*axes)
    size = 1
    for axis in axes:
        size *= layout.size(axis)
        owner = {rank: index for index, group in enumerate(joint) for rank in group}
        assert all(len({owner[rank] for rank in group}) == 1 for group in layout.groups(axis))
    assert_partition(joint, layout.world_size, size)


@given(layouts, SIDES, st.data())
def test_one_group_of_every_axis_of_a_side_meet_in_exactly_one_rank(
    layout: RankLayout, side: tuple[AxisName, ...], data: st.DataObject
) -> None:
    """Any split of a side's axes in two: a group over the one set meets a group over the other in one rank
    (in none where the world is more than these two sets span, which a split of all axes excludes)."""
    some = data.draw(st.lists(st.sampled_from(side), min_size=1, max_size=3, unique=True))
    others = [axis for axis in side if axis not in some]
    for group in layout.product_groups(*some):
        for other in layout.product_groups(*others):
            assert len(set(group) & set(other)) == 1


@given(layouts, SIDES, st.data())
def test_the_groups_of_one_rank_on_all_axes_of_a_side_share_only_that_rank(
    layout: RankLayout, side: tuple[AxisName, ...], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, layout.world_size - 1))
    mine = [set(group) for axis in side for group in layout.groups(axis) if rank in group]
    assert len(mine) == 4
    assert set.intersection(*mine) == {rank}
    for index, group in enumerate(mine):
        for other in mine[index + 1 :]:
            assert group & other == {rank}


@given(layouts)
def test_attention_and_expert_stages_hold_the_same_ranks(layout: RankLayout) -> None:
    stages = layout.product_groups("attn.tp", "attn.cp", "attn.dp")
    assert stages == layout.product_groups("ffn.etp", "ffn.ep", "ffn.edp")
    assert layout.groups("attn.pp") == layout.groups("ffn.pp")
    assert all(stage == tuple(range(stage[0], stage[-1] + 1)) for stage in stages)


@given(layouts)
def test_coordinates_are_each_rank_s_place_in_its_groups(layout: RankLayout) -> None:
    for axis in ATTN_AXES + FFN_AXES:
        name = axis.split(".")[1]
        for group in layout.groups(axis):
            assert [getattr(layout.coordinates(rank), name) for rank in group] == list(range(len(group)))


@given(rollout_specs(max_size=5))
def test_rollout_groups_partition_the_world_and_engines_are_consecutive(spec: RolloutSpec) -> None:
    layout = RolloutLayout.from_spec(spec)
    for axis in ROLLOUT_AXES:
        assert_partition(layout.groups(axis), layout.world_size, layout.size(axis))
    engines = layout.product_groups("rollout.tp", "rollout.pp")
    assert_partition(engines, layout.world_size, spec.tp * spec.pp)
    assert all(engine[-1] - engine[0] + 1 == spec.tp * spec.pp for engine in engines)


@given(training_specs(max_world_size=64) | rollout_specs(max_size=4), st.integers(1, 96))
def test_the_spec_offered_for_another_world_size_fits_it(
    spec: ParallelSpec | RolloutSpec, world_size: int
) -> None:
    assume(spec.world_size != world_size)
    with pytest.raises(LayoutError) as caught:
        check_world_size(spec, world_size)
    _, offered, fix = str(caught.value).partition(" or write ")
    if offered:
        check_world_size(parse_spec(fix), world_size)
        assert type(parse_spec(fix)) is type(spec)
