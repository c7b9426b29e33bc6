"""From ``reward.name`` of the config to a function of a whole batch.

A reward is called with the batch, not with one completion, because ``shuffled:<name>`` (the control
run) needs all of them; `per_item` lifts a function of one prompt and completion, which is what users write.
"""

import importlib
import math
import numbers
import random
from collections.abc import Sequence
from typing import Protocol

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import ConfigError
from mtrl.rewards.functions import exact_match, numeric_match


class ItemReward(Protocol):
    """Reward of one completion; what ``module:function`` names."""

    def __call__(self, prompt: Prompt, completion: Completion, /) -> float:
        """Return a finite number."""
        ...


class Reward(Protocol):
    """Rewards of a batch, one a completion and in their order; prompts are found by ``prompt_id``."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> list[float]:
        """Return finite numbers; a pure function of its arguments, so that a resumed run repeats them."""
        ...


REWARDS: dict[str, ItemReward] = {"exact_match": exact_match, "numeric_match": numeric_match}

_SHUFFLED = "shuffled:"


def load_reward(name: str, *, seed: int) -> Reward:
    """Return the reward of this name: one of `REWARDS`, ``module:function``, or ``shuffled:`` before either.

    ``seed`` is used by ``shuffled:`` alone. Raises `ConfigError`.
    """
    if name.startswith(_SHUFFLED):
        return shuffled(load_reward(name.removeprefix(_SHUFFLED), seed=seed), seed=seed)
    if name in REWARDS:
        return per_item(REWARDS[name], name)
    if ":" in name:
        return per_item(_import_reward(name), name)
    known = ", ".join(sorted(REWARDS))
    raise ConfigError(
        f"reward.name: there is no reward {name!r}; there are {known}, shuffled:<name>, "
        "and functions of your own as module:function"
    )


def per_item(function: ItemReward, name: str) -> Reward:
    """Lift a function of one completion to a batch, checking that each result is a finite number."""

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> list[float]:
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        return [_checked(function(by_id[one.prompt_id], one), name, one) for one in completions]

    return score


def shuffled(reward: Reward, *, seed: int) -> Reward:
    """Give each completion the reward of another one of the batch: nothing can be learnt from it.

    Call it with the whole batch of a step, not with one rank's share. The permutation follows from the
    seed and the policy version, so each step has its own and a resumed run repeats it.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> list[float]:
        rewards = reward(prompts, completions)
        version = max((one.policy_version for one in completions), default=0)
        source = random.Random(f"mtrl.rewards.shuffled/{seed}/{version}")
        return [
            value
            for _, value in sorted(((source.random(), value) for value in rewards), key=lambda pair: pair[0])
        ]

    return score


def _checked(value: object, name: str, completion: Completion) -> float:
    where = f"reward {name} of prompt {completion.prompt_id}, sample {completion.sample_index}"
    if not isinstance(value, numbers.Real):
        raise ConfigError(f"{where} is {value!r:.60} ({type(value).__name__}); return a float")
    if not math.isfinite(value):
        raise ConfigError(f"{where} is {float(value)}; return a finite number")
    return float(value)


def _import_reward(name: str) -> ItemReward:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"reward.name: cannot import {module_name!r} of {name!r} ({error}); a file rewards.py in the "
            "current folder is found with PYTHONPATH=. and written rewards:function"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = ", ".join(
            key for key in vars(module) if not key.startswith("_") and callable(getattr(module, key))
        )
        raise ConfigError(
            f"reward.name: {module_name!r} has no function {function_name!r}; it has {public or 'none'}"
        )
    checked: ItemReward = function
    return checked
