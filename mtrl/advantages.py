"""Rewards of a group (all completions of one prompt) to advantages. Pure; no tensors.

Suffix: G is the completions of one group.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import fmean
from typing import Literal

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]

# Keeps rewards that differ by rounding alone from being blown up to +-1; far below any real difference.
_STD_FLOOR = 1e-6


def group_advantages(rewards_G: Sequence[float], kind: AdvantageKind = "grpo") -> tuple[float, ...]:
    """Return one advantage a completion; all zero when the rewards are equal or there is only one.

    - ``grpo``: (r - mean) / (std + 1e-6), std of the population (arXiv 2402.03300, section 4.1.2)
    - ``dr_grpo``: r - mean, which weighs easy and hard prompts alike (arXiv 2503.20783, section 3.2)
    - ``rloo``: r - mean of the others' rewards, an unbiased baseline (arXiv 2402.14740, section 2)

    >>> group_advantages([1.0, 0.0, 0.0, 1.0], "dr_grpo")
    (0.5, -0.5, -0.5, 0.5)
    """
    size = len(rewards_G)
    # Compared, not subtracted: the mean of equal rewards may differ from them in the last bit.
    if size < 2 or min(rewards_G) == max(rewards_G):
        return (0.0,) * size
    mean = fmean(rewards_G)
    centred = [reward - mean for reward in rewards_G]
    if kind == "dr_grpo":
        scale = 1.0
    elif kind == "rloo":
        scale = size / (size - 1)
    else:
        scale = 1.0 / (math.sqrt(fmean([value * value for value in centred])) + _STD_FLOOR)
    return tuple(value * scale for value in centred)


def batch_advantages(
    rewards: Sequence[float], groups: Sequence[Hashable], kind: AdvantageKind = "grpo"
) -> tuple[float, ...]:
    """Return advantages in the order of ``rewards``; ``groups[i]`` is the prompt id of ``rewards[i]``."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    advantages = [0.0] * len(rewards)
    for indices in members.values():
        values = group_advantages([rewards[index] for index in indices], kind)
        for index, value in zip(indices, values, strict=True):
            advantages[index] = value
    return tuple(advantages)
