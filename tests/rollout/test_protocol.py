"""Sampling settings and the guard of random states."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from mtrl.parallel.errors import ConfigError
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.rng import preserved_rng_states

GOOD: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, "num_samples": 1, "stop_token_ids": (),
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.inf), ("temperature", math.nan), ("top_p", 0.0),
        ("top_p", 1.1), ("max_new_tokens", 0), ("num_samples", 0), ("stop_token_ids", (3, -1)),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_sampled_with_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingSettings(**(GOOD | {field: value}))


def test_random_states_are_restored_even_after_an_error() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyError), preserved_rng_states():
        draws()
        torch.manual_seed(0)
        raise KeyError
    assert draws() == wanted
