"""OLMoE (``OlmoeForCausalLM``): every layer a mixture; queries and keys normalised over all heads at once."""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, num_experts, refuse
from mtrl.models.families.tables import attention_rows, fused_experts, model_rows, moe_rows


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``OlmoeForCausalLM``'s config; ``intermediate_size`` is an expert's."""
    refuse(hf, "OLMoE", hidden_act="silu", attention_bias=False, clip_qkv=None)
    moe = MoeConfig(
        num_experts=num_experts(hf),
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=int(require(hf, "intermediate_size")),
        normalize_top_k=bool(hf.get("norm_topk_prob", False)),
        moe_layers=tuple(range(int(require(hf, "num_hidden_layers")))),
    )
    rope = read_rope(hf, kinds=("default",))
    kv_heads = hf.get("num_key_value_heads") or hf.get("num_attention_heads")
    fields = decoder_fields(hf, family="olmoe", norm_eps=1e-5, num_kv_heads=kv_heads)
    return ModelConfig(**fields, rope=rope, qk_norm="all_heads", moe=moe)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table."""
    return model_rows(config) + attention_rows(config) + moe_rows(config)


register_family(
    Family(
        name="olmoe",
        architectures=("OlmoeForCausalLM",),
        read_config=read_config,
        weights=weights,
        other_formats=lambda config: (fused_experts(weights(config)),),
    )
)
