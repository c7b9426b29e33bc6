"""Layers that go straight to their kernels give the bits that vLLM's own way gives."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.toys import Kind

pytestmark = pytest.mark.vllm

KINDS: tuple[Kind, ...] = ("dense", "moe")
Scenario = Callable[[str, int], list[Any]]


@pytest.fixture(scope="module")
def alone(scenario: Scenario) -> dict[str, Any]:
    return {kind: scenario("updates_alone", 1)[0][kind]["short paths"] for kind in KINDS}


@pytest.fixture(scope="module")
def together(scenario: Scenario) -> dict[str, Any]:
    return {kind: scenario("updates_together", 2)[0][kind]["short paths"] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", ["alone", "together"])
def test_short_paths_give_the_same_tokens_and_the_same_bits(
    request: pytest.FixtureRequest, world: str, kind: Kind
) -> None:
    result = request.getfixturevalue(world)[kind]
    assert result["same"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", ["alone", "together"])
def test_short_paths_read_new_weights(request: pytest.FixtureRequest, world: str, kind: Kind) -> None:
    result = request.getfixturevalue(world)[kind]
    assert result["moved"] and result["same after new weights"]


NORMS = {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}


def test_on_one_rank_every_norm_projection_and_expert_layer_is_short(alone: dict[str, Any]) -> None:
    # vLLM has changed a class when one is missing: the way in vllm_short_paths.py no longer applies.
    assert set(alone["dense"]["names"]) == NORMS | {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(alone["moe"]["names"]) == NORMS | {"qkv_proj", "o_proj", "experts"}


def test_layers_that_add_over_ranks_stay_vllms_own(together: dict[str, Any]) -> None:
    assert set(together["dense"]["names"]) == NORMS | {"qkv_proj", "gate_up_proj"}
    assert set(together["moe"]["names"]) == NORMS | {"qkv_proj"}
