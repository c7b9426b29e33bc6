"""Fields of Megatron's that would let the layout change the result are refused."""

from typing import Any

import pytest

from mtrl.models.megatron_config import recompute_fields, to_transformer_config
from mtrl.parallel.errors import ConfigError

REFUSED: dict[str, tuple[Any, str]] = {
    "moe_expert_capacity_factor": (1.25, "given 1.25; which tokens an expert then drops depends on"),
    "moe_input_jitter_eps": (0.1, "every rank would draw noise of its own"),
    "moe_router_force_load_balancing": (True, "experts would be chosen at random"),
    "moe_router_load_balancing_type": ("aux_loss", "write actor.router instead"),
    "moe_aux_loss_coeff": (0.01, "write actor.router instead"),
    "moe_z_loss_coeff": (0.01, "write actor.router instead"),
    "moe_router_bias_update_rate": (0.001, "write actor.router instead"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_depend_on_the_layout_is_refused(name: str) -> None:
    value, reason = REFUSED[name]
    nothing: Any = None  # refused before model or layout are looked at
    with pytest.raises(ConfigError) as caught:
        to_transformer_config(nothing, nothing, nothing, **{name: value})
    assert str(caught.value).startswith(f"{name}: given {value}; ") and reason in str(caught.value)


def test_recomputation_is_spelled_as_megatron_does() -> None:
    assert recompute_fields("none", ["moe"]) == {}
    assert recompute_fields("full", ["moe"])["recompute_method"] == "uniform"
    expected = {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]}
    assert recompute_fields("selective", ("moe", "core_attn")) == expected
