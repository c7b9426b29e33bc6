"""Which models the backend of Transformer Engine refuses, and why; no Megatron, no torch."""

from dataclasses import replace
from typing import Any

import pytest

from mtrl.models.backends import unsupported
from mtrl.models.config import ModelConfig, RopeConfig

pytestmark = pytest.mark.one_stack

CONFIG = ModelConfig(
    family="qwen3", num_layers=2, hidden_size=8, num_attention_heads=2, num_kv_heads=1, head_dim=4,
    intermediate_size=16, vocab_size=10, max_position_embeddings=64, rope=RopeConfig(theta=1e4),
    norm_eps=1e-6, tie_embeddings=False, hf_config={},
)  # fmt: skip
CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": ({"sinks": True}, "qwen3 has attention sinks, which only torch_native computes"),
    "windows": ({"windows": (0, 8)}, "sliding windows"),
    "biases": ({"linear_bias": True}, "biases of experts and output projections"),
    "activation": ({"activation": "clamped_swiglu"}, "the activation clamped_swiglu"),
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_plain_model_is_computed(precision: str) -> None:
    assert unsupported(CONFIG, precision=precision, is_cuda=precision == "bf16") == ""


@pytest.mark.parametrize("why", CANNOT)
def test_a_part_that_it_lacks_is_named(why: str) -> None:
    fields, reason = CANNOT[why]
    assert reason in unsupported(replace(CONFIG, **fields), precision="bf16", is_cuda=True)


def test_its_kernels_have_no_float64_and_attend_in_bf16() -> None:
    assert "fp64" in unsupported(CONFIG, precision="fp64", is_cuda=False)
    assert "fp32" in unsupported(CONFIG, precision="fp32", is_cuda=True)
