"""Qwen3, dense and mixture-of-experts (``Qwen3ForCausalLM``, ``Qwen3MoeForCausalLM``).

Grouped-query attention with RMSNorm on each query and key head, no biases, SwiGLU; the MoE model
routes by softmax over all experts and, with ``norm_topk_prob``, rescales the chosen ones to sum to 1.
"""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, refuse, refuse_windows, sparse_moe
from mtrl.models.families.tables import attention_rows, fused_experts, mlp_rows, model_rows, moe_rows


def _read(hf: Mapping[str, Any], family: str, moe: MoeConfig | None) -> ModelConfig:
    refuse(hf, "Qwen3", hidden_act="silu", use_sliding_window=False, attention_bias=False)
    refuse_windows(hf, "Qwen3")
    rope = read_rope(hf, kinds=("default", "yarn"))
    return ModelConfig(**decoder_fields(hf, family=family), rope=rope, qk_norm="head", moe=moe)


def read_dense(hf: Mapping[str, Any]) -> ModelConfig:
    """``Qwen3ForCausalLM``'s config, whose head dim is not implied by other sizes."""
    require(hf, "head_dim")
    return _read(hf, "qwen3", None)


def read_moe(hf: Mapping[str, Any]) -> ModelConfig:
    """``Qwen3MoeForCausalLM``'s config."""
    return _read(hf, "qwen3_moe", sparse_moe(hf))


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of both: a dense model simply has no mixture layers."""
    return model_rows(config) + attention_rows(config) + mlp_rows(config) + moe_rows(config)


register_family(
    Family(name="qwen3", architectures=("Qwen3ForCausalLM",), read_config=read_dense, weights=weights)
)
register_family(
    Family(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        read_config=read_moe,
        weights=weights,
        other_formats=lambda config: (fused_experts(weights(config)),),
    )
)
