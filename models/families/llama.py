"""Llama 3 (``LlamaForCausalLM``): grouped-query attention without biases, SwiGLU, rope scaling of its own."""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, read_rope
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, refuse
from mtrl.models.families.tables import attention_rows, mlp_rows, model_rows


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``LlamaForCausalLM``'s config."""
    refuse(hf, "Llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = read_rope(hf, kinds=("default", "llama3", "linear"))
    kv_heads = hf.get("num_key_value_heads") or hf.get("num_attention_heads")
    return ModelConfig(**decoder_fields(hf, family="llama", num_kv_heads=kv_heads), rope=rope)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table."""
    return model_rows(config) + attention_rows(config) + mlp_rows(config)


register_family(
    Family(name="llama", architectures=("LlamaForCausalLM",), read_config=read_config, weights=weights)
)
