"""gpt-oss (``GptOssForCausalLM``).

Attention sinks, windows on alternate layers, biases on every linear layer, YaRN, clamped SwiGLU. Experts
are stored stacked and transposed, with gate and up projections interleaved.
"""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import ModelConfig, MoeConfig, read_rope, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.models.families.common import decoder_fields, num_experts, refuse
from mtrl.models.families.tables import LAYER, attention_rows, model_rows, row
from mtrl.parallel.errors import ModelError

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""transformers' default ``rope_parameters`` of this architecture."""


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """``GptOssForCausalLM``'s config; ``intermediate_size`` is an expert's."""
    refuse(hf, "gpt-oss", hidden_act="silu", attention_bias=True, swiglu_limit=7.0, swiglu_alpha=1.702)
    require(hf, "head_dim")  # its default is not implied by other sizes
    num_layers = int(require(hf, "num_hidden_layers"))
    moe = MoeConfig(
        num_experts=num_experts(hf),
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=int(require(hf, "intermediate_size")),
        normalize_top_k=True,
        moe_layers=tuple(range(num_layers)),
    )
    scaled = hf.get("rope_parameters") or hf.get("rope_scaling")
    rope = read_rope(
        hf if scaled else {**hf, "rope_scaling": _YARN}, kinds=("default", "yarn"), theta=150000.0
    )
    return ModelConfig(
        **decoder_fields(hf, family="gpt_oss", norm_eps=1e-5),
        rope=rope,
        qkv_bias=True,
        linear_bias=True,
        sinks=True,
        windows=_windows(hf, num_layers),
        activation="clamped_swiglu",
        moe=moe,
    )


def _windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    alternate = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    kinds = list(hf.get("layer_types") or alternate)
    if len(kinds) != num_layers or set(kinds) - set(alternate) - {"full_attention"}:
        raise ModelError(f"gpt-oss with layer_types {kinds} for {num_layers} layers is not supported")
    size = int(hf.get("sliding_window", 128) or 0)
    if not size and "sliding_attention" in kinds:
        raise ModelError("gpt-oss with sliding_window 0 is not supported; say how many keys a query sees")
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table."""
    at, layers = LAYER + "mlp.", config.moe_layers
    return (
        *model_rows(config),
        *attention_rows(config),
        row("moe.router", at + "router.weight", "n h", layers),
        row("moe.router_bias", at + "router.bias", "n", layers),
        row("expert.gate_up", at + "experts.gate_up_proj", "e h (j c)", layers),
        row("expert.gate_up_bias", at + "experts.gate_up_proj_bias", "e (j c)", layers),
        row("expert.down", at + "experts.down_proj", "e j h", layers),
        row("expert.down_bias", at + "experts.down_proj_bias", "e h", layers),
    )


register_family(
    Family(name="gpt_oss", architectures=("GptOssForCausalLM",), read_config=read_config, weights=weights)
)
