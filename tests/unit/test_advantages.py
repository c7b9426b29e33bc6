import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtrl.advantages import AdvantageKind, batch_advantages, group_advantages

KINDS: list[AdvantageKind] = ["grpo", "dr_grpo", "rloo"]
# Multiples of 1/8 as a verifiable reward gives them: no two differ by rounding alone.
rewards = st.integers(-80, 80).map(lambda eighths: eighths / 8)
groups = st.lists(rewards, min_size=1, max_size=16)
kinds = st.sampled_from(KINDS)


@given(rewards_G=groups, kind=kinds)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(
    rewards_G: list[float], kind: AdvantageKind
) -> None:
    advantages = group_advantages(rewards_G, kind)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-9)
    ranked = sorted(zip(rewards_G, advantages, strict=True))
    assert [value for _, value in ranked] == sorted(advantages)


@given(reward=st.floats(-1e6, 1e6), size=st.integers(1, 20), kind=kinds)
def test_equal_rewards_give_exactly_zero(reward: float, size: int, kind: AdvantageKind) -> None:
    assert group_advantages([reward] * size, kind) == (0.0,) * size


@given(rewards_G=groups.filter(lambda values: len(set(values)) > 1), shift=rewards, scale=st.integers(1, 8))
def test_grpo_does_not_feel_shift_or_scale_of_rewards(
    rewards_G: list[float], shift: float, scale: int
) -> None:
    moved = group_advantages([reward * scale + shift for reward in rewards_G])
    # The floor under the standard deviation, 1e-6, is felt by 1e-5 at the smallest that occurs here, 0.03.
    assert moved == pytest.approx(group_advantages(rewards_G), rel=1e-4)
    assert fmean(value * value for value in moved) == pytest.approx(1.0, rel=1e-3)


@given(rewards_G=groups.filter(lambda values: len(values) > 1))
def test_rloo_subtracts_the_mean_of_the_others(rewards_G: list[float]) -> None:
    for index, advantage in enumerate(group_advantages(rewards_G, "rloo")):
        others = rewards_G[:index] + rewards_G[index + 1 :]
        assert advantage == pytest.approx(rewards_G[index] - fmean(others), abs=1e-9)


def test_known_groups() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0], "dr_grpo") == (0.5, -0.5, -0.5, 0.5)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "rloo") == pytest.approx((1.0, -1 / 3, -1 / 3, -1 / 3))
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx((1.0, -1.0, -1.0, 1.0), rel=1e-5)
    assert group_advantages([], "grpo") == ()


@given(members=st.lists(st.tuples(st.integers(0, 4), rewards), max_size=40), kind=kinds)
def test_a_batch_is_its_groups_wherever_their_members_stand(
    members: list[tuple[int, float]], kind: AdvantageKind
) -> None:
    advantages = batch_advantages([value for _, value in members], [group for group, _ in members], kind)
    for group in range(5):
        own = [value for name, value in members if name == group]
        got = tuple(value for value, (name, _) in zip(advantages, members, strict=True) if name == group)
        assert got == group_advantages(own, kind)
