"""GLM-4.5-MoE (``Glm4MoeForCausalLM``).

Rotary position on a part of each head, biases on queries, keys and values, sigmoid routing with a selection
bias, shared experts, the first layers dense. The multi-token prediction layer of a published folder is
carried, not computed (``carried.py``).
"""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, num_experts, num_prediction_layers, refuse
from mtrl.models.families.tables import attention_rows, fused_experts, mlp_rows, model_rows, moe_rows


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``Glm4MoeForCausalLM``'s config."""
    refuse(hf, "GLM-4.5-MoE", hidden_act="silu", n_group=1, topk_group=1, norm_topk_prob=True)
    expert_size = int(require(hf, "moe_intermediate_size"))
    moe = MoeConfig(
        num_experts=num_experts(hf),
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=expert_size,
        normalize_top_k=True,
        moe_layers=tuple(
            range(int(hf.get("first_k_dense_replace", 1)), int(require(hf, "num_hidden_layers")))
        ),
        score="sigmoid",
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        selection_bias=True,
        shared_hidden_size=expert_size * int(hf.get("n_shared_experts", 1)),
    )
    return ModelConfig(
        **decoder_fields(hf, family="glm4_moe", norm_eps=1e-5),
        rope=read_rope(hf, kinds=("default",), fraction=0.5),
        qkv_bias=bool(hf.get("attention_bias", False)),
        qk_norm="head" if hf.get("use_qk_norm", False) else "none",
        moe=moe,
        num_prediction_layers=num_prediction_layers(hf),
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table."""
    return model_rows(config) + attention_rows(config) + mlp_rows(config) + moe_rows(config)


register_family(
    Family(
        name="glm4_moe",
        architectures=("Glm4MoeForCausalLM",),
        read_config=read_config,
        weights=weights,
        other_formats=lambda config: (fused_experts(weights(config)),),
    )
)
