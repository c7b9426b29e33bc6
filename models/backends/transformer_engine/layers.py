"""Megatron's own layer specs for Transformer Engine, with what a model of ours needs otherwise."""

import functools
from typing import Any

from mtrl.models.backends.latent_attention import NamedLatentAttention
from mtrl.models.backends.torch_native.norms import AllHeadsRMSNorm
from mtrl.models.backends.transformer_engine.attention import CoreAttention
from mtrl.models.config import LATENT_NORM_EPS, ModelConfig
from mtrl.models.precision import Fp8, Recipe
from mtrl.models.router import Router
from mtrl.parallel.groups import ParallelGroups
from mtrl.parallel.megatron_ready import MEGATRON_0_19

from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec

NORM = TENorm
_RECIPES: dict[Recipe, str] = {"fp8_blockwise": "blockwise", "fp8_delayed": "delayed", "mxfp8": "mxfp8"}
"""Megatron's names."""


class LatentNormLinear(TELayerNormColumnParallelLinear):  # type: ignore[misc]
    """The up projections of latent attention, behind their norms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = LATENT_NORM_EPS


class LatentAttention(NamedLatentAttention):
    """Megatron's latent attention, with exactly the modules that its spec names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, parameter in self.named_parameters():
            if "_down_proj." in name:
                # Every tensor parallel rank holds it whole. Megatron 0.16 leaves Transformer Engine's mark of
                # a shard (TELinear, "duplicated"), so the gradient norm would count it once a rank.
                parameter.tensor_model_parallel = False


def transformer_fields(config: ModelConfig, fp8: Fp8 | None) -> dict[str, Any]:
    """Megatron's fields for this backend."""
    fields: dict[str, Any] = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": bool(config.moe)}
    if fp8 is not None:
        fields |= {
            "fp8": "e4m3" if fp8.gradients == "e4m3" else "hybrid",
            "fp8_recipe": _RECIPES[fp8.recipe],
            "fp8_param": fp8.parameters,
            "first_last_layers_bf16": bool(fp8.bf16_first_layers or fp8.bf16_last_layers),
            "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
        }
    return fields


def layer_spec(config: ModelConfig, groups: ParallelGroups, layer: int) -> ModuleSpec:
    """The spec of (0-based) layer ``layer`` of the model."""
    is_moe = layer in config.moe_layers
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.moe.num_experts if config.moe and is_moe else None,
        moe_grouped_gemm=is_moe,
        qk_layernorm=config.qk_norm == "head" or config.mla is not None,
        multi_latent_attention=config.mla is not None,
    )
    if is_moe:
        mixture = spec.submodules.mlp
        # A partial of the layer in Megatron 0.19, a ModuleSpec before.
        (mixture.keywords["submodules"] if MEGATRON_0_19 else mixture.submodules).router = Router
    attention = spec.submodules.self_attention
    parts = attention.submodules
    parts.core_attention = CoreAttention
    if config.mla is not None:
        attention.module = LatentAttention
        parts.linear_q_up_proj = parts.linear_kv_up_proj = LatentNormLinear
    elif config.qk_norm == "all_heads":
        parts.q_layernorm, parts.k_layernorm = (
            _filled(AllHeadsRMSNorm, num_heads=num_heads, tp_group=groups.attn.tp)
            for num_heads in (config.num_attention_heads, config.num_kv_heads)
        )
    return spec


def _filled(kind: type, **arguments: Any) -> Any:
    """``kind`` with keyword arguments filled in, as either Megatron builds it."""
    if MEGATRON_0_19:
        return functools.partial(kind, **arguments)
    return ModuleSpec(module=kind, params=arguments)
