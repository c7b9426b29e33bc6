"""Megatron's layer specs with this backend's modules; linear layers and dispatcher are Megatron's."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mtrl.models.backends.latent_attention import NamedLatentAttention
from mtrl.models.backends.torch_native.attention import CoreAttention
from mtrl.models.backends.torch_native.experts import GroupedExperts
from mtrl.models.backends.torch_native.fp8 import block_linear
from mtrl.models.backends.torch_native.fp8_linears import (
    BlockColumnParallelLinear,
    BlockRowParallelLinear,
    with_fp8,
)
from mtrl.models.backends.torch_native.norms import AllHeadsRMSNorm, RMSNorm
from mtrl.models.config import LATENT_NORM_EPS, ModelConfig
from mtrl.models.precision import Fp8
from mtrl.models.router import Router
from mtrl.parallel.groups import ParallelGroups
from mtrl.parallel.megatron_ready import MEGATRON_0_19

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)


class TorchNativeProvider(LocalSpecProvider):  # type: ignore[misc]
    """Tells Megatron's spec builders to use the modules of this folder for one layer of one model.

    ``fp8``: None, or how its linears run in FP8 blocks.
    """

    def __init__(self, model: ModelConfig, fp8: Fp8 | None) -> None:
        self.model, self.fp8 = model, fp8

    def column_parallel_linear(self) -> type:
        """Linears whose output features are over ``attn.tp``."""
        if self.fp8 is not None:
            return with_fp8(BlockColumnParallelLinear, self.fp8)
        plain: type = super().column_parallel_linear()
        return plain

    def row_parallel_linear(self) -> type:
        """Linears whose input features are over ``attn.tp``."""
        if self.fp8 is not None:
            return with_fp8(BlockRowParallelLinear, self.fp8)
        plain: type = super().row_parallel_linear()
        return plain

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """The norm of every place."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention without projections."""
        return CoreAttention

    def grouped_mlp_modules(self, *unused: Any) -> Any:
        """The experts: a builder for Megatron 0.19, a (module, submodules) pair before."""
        arguments = {"model": self.model, "fp8": self.fp8}
        if MEGATRON_0_19:
            return functools.partial(GroupedExperts, **arguments)  # type: ignore[arg-type]
        return _as_module(GroupedExperts, **arguments), None


class LatentAttention(NamedLatentAttention):
    """Megatron's latent attention, with exactly the modules that its spec names, and whole down projections.

    Megatron's local spec shards the rows of the down projections over ``attn.tp``, and then the gradient of
    the rotary key, which all heads share, lacks what other ranks' heads add to it: the gather after the
    projection splits in backward, and nothing sums. Its Transformer Engine spec holds them whole on every
    rank, each of which projects its share of the tokens; so does this.
    """

    def __init__(self, *args: Any, fp8: Fp8 | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        kv_size = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, kv_size, fp8)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank, fp8)


def layer_spec(
    config: ModelConfig, groups: ParallelGroups, layer: int, *, fp8: Fp8 | None = None
) -> ModuleSpec:
    """The spec of (0-based) layer ``layer`` of the model."""
    is_fp8 = fp8 is not None and fp8.covers(layer, config.num_layers)
    backend = TorchNativeProvider(config, fp8 if is_fp8 else None)
    is_moe = layer in config.moe_layers
    num_experts = config.moe.num_experts if is_moe and config.moe else None
    make_attention = _latent_attention if config.mla else _attention
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=make_attention(config, groups, layer, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(backend, num_experts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp(backend: TorchNativeProvider, num_experts: int | None) -> Any:
    spec = get_mlp_module_spec_for_backend(backend=backend, num_experts=num_experts)
    if num_experts is not None:
        # A partial of the layer in Megatron 0.19, a ModuleSpec before.
        submodules = spec.keywords["submodules"] if MEGATRON_0_19 else spec.submodules
        submodules.router = Router
    return spec


def _attention(
    config: ModelConfig, groups: ParallelGroups, layer: int, backend: TorchNativeProvider
) -> ModuleSpec:
    norms: list[Any] = [IdentityOp, IdentityOp]
    if config.qk_norm == "head":
        norms = [RMSNorm, RMSNorm]
    elif config.qk_norm == "all_heads":
        norms = [
            _as_module(AllHeadsRMSNorm, num_heads=num_heads, tp_group=groups.attn.tp)
            for num_heads in (config.num_attention_heads, config.num_kv_heads)
        ]
    core = functools.partial(
        CoreAttention, window=config.windows[layer] if config.windows else 0, has_sinks=config.sinks
    )
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=core,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norms[0],
            k_layernorm=norms[1],
        ),
    )


def _latent_attention(
    config: ModelConfig, groups: ParallelGroups, layer: int, backend: TorchNativeProvider
) -> ModuleSpec:
    assert config.mla is not None
    norm = _as_module(RMSNorm, eps=LATENT_NORM_EPS)
    column = backend.column_parallel_linear()
    return ModuleSpec(
        module=_as_module(LatentAttention, fp8=backend.fp8),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            # Megatron takes only linears that it knows here; `LatentAttention` puts others in their places.
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=column,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=column,
            core_attention=CoreAttention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm if config.mla.query_rank else IdentityOp,
            kv_layernorm=norm,
        ),
    )


class WholeLinear(nn.Module):
    """A linear layer without bias that each tensor parallel rank holds whole, for its share of the tokens."""

    def __init__(
        self,
        config: TransformerConfig,
        size_in: int,
        size_out: int,
        fp8: Fp8 | None = None,
    ) -> None:
        super().__init__()
        self.fp8 = fp8
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """``x`` [..., size_in] to [..., size_out], and no bias: Megatron's interface."""
        if self.fp8 is not None:
            return block_linear(x, self.weight, self.fp8), None
        return F.linear(x, self.weight), None


def _as_module(kind: type, **arguments: Any) -> type:
    """``kind`` with keyword arguments filled in, still a class: Megatron 0.16 builds classes only."""

    class Filled(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, **arguments})

    Filled.__name__ = Filled.__qualname__ = kind.__name__
    return Filled
