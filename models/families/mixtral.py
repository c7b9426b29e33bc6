"""Mixtral (``MixtralForCausalLM``): every layer a mixture, experts named w1 (gate), w3 (up) and w2 (down)."""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, num_experts, refuse
from mtrl.models.families.tables import LAYER, attention_rows, fused_experts, model_rows, moe_rows


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``MixtralForCausalLM``'s config; ``intermediate_size`` is an expert's."""
    refuse(hf, "Mixtral", hidden_act="silu", sliding_window=None, router_jitter_noise=0.0)
    moe = MoeConfig(
        num_experts=num_experts(hf),
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=int(require(hf, "intermediate_size")),
        normalize_top_k=True,
        moe_layers=tuple(range(int(require(hf, "num_hidden_layers")))),
    )
    rope = read_rope(hf, kinds=("default",), theta=1e6)
    return ModelConfig(**decoder_fields(hf, family="mixtral", norm_eps=1e-5), rope=rope, moe=moe)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table."""
    experts = moe_rows(config, at=LAYER + "block_sparse_moe.", names=("w1", "w3", "w2"))
    return model_rows(config) + attention_rows(config) + experts


register_family(
    Family(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        read_config=read_config,
        weights=weights,
        other_formats=lambda config: (fused_experts(weights(config)),),
    )
)
