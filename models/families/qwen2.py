"""Qwen2 and Qwen2.5, dense and mixture-of-experts (``Qwen2ForCausalLM``, ``Qwen2MoeForCausalLM``).

Queries, keys and values have biases. The MoE model does not rescale the chosen experts' probabilities, and
has a shared expert whose output a sigmoid of the token scales.
"""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, refuse, refuse_windows, sparse_moe
from mtrl.models.families.tables import attention_rows, fused_experts, mlp_rows, model_rows, moe_rows


def _read(hf: Mapping[str, Any], family: str, moe: MoeConfig | None) -> ModelConfig:
    refuse(hf, "Qwen2", hidden_act="silu", use_sliding_window=False)
    refuse_windows(hf, "Qwen2")
    rope = read_rope(hf, kinds=("default", "yarn"))
    return ModelConfig(
        **decoder_fields(hf, family=family),
        rope=rope,
        qkv_bias=moe is None or bool(hf.get("qkv_bias", True)),
        moe=moe,
    )


def read_dense(hf: Mapping[str, Any]) -> ModelConfig:
    """``Qwen2ForCausalLM``'s config."""
    return _read(hf, "qwen2", None)


def read_moe(hf: Mapping[str, Any]) -> ModelConfig:
    """``Qwen2MoeForCausalLM``'s config."""
    size = int(require(hf, "shared_expert_intermediate_size"))
    return _read(hf, "qwen2_moe", sparse_moe(hf, shared_hidden_size=size, shared_gate=True))


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of both: a dense model simply has no mixture layers."""
    experts = moe_rows(config, shared="shared_expert")
    return model_rows(config) + attention_rows(config) + mlp_rows(config) + experts


register_family(
    Family(name="qwen2", architectures=("Qwen2ForCausalLM",), read_config=read_dense, weights=weights)
)
register_family(
    Family(
        name="qwen2_moe",
        architectures=("Qwen2MoeForCausalLM",),
        read_config=read_moe,
        weights=weights,
        other_formats=lambda config: (fused_experts(weights(config)),),
    )
)
