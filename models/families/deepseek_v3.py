"""DeepSeek-V3 and R1, Moonlight, Kimi-K2 (all ``DeepseekV3ForCausalLM``).

Latent attention, sigmoid routing with a selection bias within the best groups, shared experts, the first
layers dense. Rotary dims lie interleaved, which is how Megatron's latent attention reads them.
"""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import MlaConfig, ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, num_experts, num_prediction_layers, present, refuse
from mtrl.models.families.tables import LAYER, fused_experts, mlp_rows, model_rows, moe_rows, row
from mtrl.parallel.errors import ModelError

NUM_SCORED = 2
"""A group's score is the sum of this many of its experts' scores (transformers' and vLLM's routers)."""


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``DeepseekV3ForCausalLM``'s config."""
    refuse(
        hf, "DeepSeek-V3", hidden_act="silu", attention_bias=False, norm_topk_prob=True, rope_interleave=True,
        topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1,
    )  # fmt: skip
    expert_size = int(require(hf, "moe_intermediate_size"))
    first_moe = int(hf.get("first_k_dense_replace", 3))
    moe = MoeConfig(
        num_experts=num_experts(hf),
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=expert_size,
        normalize_top_k=True,
        moe_layers=tuple(range(first_moe, int(require(hf, "num_hidden_layers")))),
        score="sigmoid",
        scale=float(hf.get("routed_scaling_factor", 2.5)),
        selection_bias=True,
        num_groups=int(hf.get("n_group", 8) or 1),
        top_groups=int(hf.get("topk_group", 4) or 1),
        shared_hidden_size=expert_size * int(hf.get("n_shared_experts", 1) or 0),
    )
    # Megatron scores a group by its top_k // top_groups best experts.
    if moe.num_groups > 1 and moe.top_k // moe.top_groups != NUM_SCORED:
        raise ModelError(
            f"num_experts_per_tok {moe.top_k} with topk_group {moe.top_groups} of n_group {moe.num_groups}: "
            f"Megatron-Core scores a group by its {moe.top_k // moe.top_groups} best experts, this "
            f"architecture by {NUM_SCORED}; num_experts_per_tok // topk_group must be {NUM_SCORED}"
        )
    mla = MlaConfig(
        query_rank=int(present(hf, "q_lora_rank") or 0) or None,
        kv_rank=int(require(hf, "kv_lora_rank")),
        nope_dim=int(require(hf, "qk_nope_head_dim")),
        rope_dim=int(require(hf, "qk_rope_head_dim")),
        value_dim=int(require(hf, "v_head_dim")),
    )
    heads = hf.get("num_attention_heads")  # latent attention has no groups, whatever the config says
    fields = decoder_fields(hf, family="deepseek_v3", num_kv_heads=heads) | {"head_dim": mla.rope_dim}
    fields |= {"num_prediction_layers": num_prediction_layers(hf)}
    return ModelConfig(**fields, rope=read_rope(hf, kinds=("default", "yarn")), mla=mla, moe=moe)


def attention_rows(config: ModelConfig) -> tuple[Weight, ...]:
    """Latent attention; queries in two steps where there is a query rank."""
    at, every = LAYER + "self_attn.", tuple(range(config.num_layers))
    queries: tuple[Weight, ...] = (row("mla.query", at + "q_proj.weight", "(m x) h", every),)
    if config.mla is not None and config.mla.query_rank:
        queries = (
            row("mla.query_down", at + "q_a_proj.weight", "a h", every),
            row("mla.query_down_norm", at + "q_a_layernorm.weight", "a", every),
            row("mla.query_up", at + "q_b_proj.weight", "(m x) a", every),
        )
    return (
        *queries,
        row("mla.kv_down", at + "kv_a_proj_with_mqa.weight", "b h", every),
        row("mla.kv_down_norm", at + "kv_a_layernorm.weight", "B", every),
        row("mla.kv_up", at + "kv_b_proj.weight", "(m y) B", every),
        row("mla.output", at + "o_proj.weight", "h (m w)", every),
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table."""
    return model_rows(config) + attention_rows(config) + mlp_rows(config) + moe_rows(config)


register_family(
    Family(
        name="deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        read_config=read_config,
        weights=weights,
        other_formats=lambda config: (fused_experts(weights(config)),),
    )
)
