"""Which backend a run gets, and what is refused; no Megatron, no torch."""

from dataclasses import replace
from typing import Any

import pytest

from mtrl.models.backends import choose_backend, unsupported
from mtrl.models.config import ModelConfig, RopeConfig
from mtrl.models.precision import Fp8
from mtrl.parallel.errors import ConfigError

pytestmark = pytest.mark.one_stack

CONFIG = ModelConfig(
    family="qwen3", num_layers=2, hidden_size=8, num_attention_heads=2, num_kv_heads=1, head_dim=4,
    intermediate_size=16, vocab_size=10, max_position_embeddings=64, rope=RopeConfig(theta=1e4),
    norm_eps=1e-6, tie_embeddings=False, hf_config={},
)  # fmt: skip
HERE: dict[str, Any] = {"precision": "bf16", "missing": "", "is_cuda": True}
CANNOT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not installed": ({}, {"missing": "te: not installed"}, "te: not installed"),
    "no GPU": ({}, {"is_cuda": False}, "on a GPU alone"),
    "sinks": ({"sinks": True}, {}, "qwen3 has attention sinks, which only torch_native computes"),
    "windows": ({"windows": (0, 8)}, {}, "sliding windows"),
    "biases": ({"linear_bias": True}, {}, "biases of experts and output projections"),
    "activation": ({"activation": "clamped_swiglu"}, {}, "the activation clamped_swiglu"),
    "fp64": ({}, {"precision": "fp64"}, "precision fp64"),
    "delayed": ({}, {"fp8": Fp8(recipe="fp8_delayed", bf16_last_layers=1)}, "first or last layers"),
    "fp32": ({}, {"precision": "fp32"}, "precision fp32"),
}


def test_auto_takes_transformer_engine_where_it_can_compute_the_model() -> None:
    assert choose_backend("auto", CONFIG, **HERE) == "transformer_engine"
    assert choose_backend("transformer_engine", CONFIG, **HERE) == "transformer_engine"


@pytest.mark.parametrize("why", CANNOT)
def test_what_transformer_engine_cannot_do_auto_leaves_to_torch_native(why: str) -> None:
    model, here, _ = CANNOT[why]
    assert choose_backend("auto", replace(CONFIG, **model), **(HERE | here)) == "torch_native"


@pytest.mark.parametrize("why", CANNOT)
def test_what_transformer_engine_cannot_do_is_refused_with_its_reason(why: str) -> None:
    model, here, reason = CANNOT[why]
    with pytest.raises(ConfigError, match=r"^model\.backend: transformer_engine: .*; write auto or") as error:
        choose_backend("transformer_engine", replace(CONFIG, **model), **(HERE | here))
    assert reason in str(error.value)


def test_torch_native_is_never_refused() -> None:
    here: dict[str, Any] = {"precision": "fp64", "missing": "te: not installed", "is_cuda": False}
    assert choose_backend("torch_native", replace(CONFIG, sinks=True), **here) == "torch_native"


def test_fp32_is_left_to_checks_without_a_gpu() -> None:
    assert unsupported(CONFIG, precision="fp32", is_cuda=False) == ""
