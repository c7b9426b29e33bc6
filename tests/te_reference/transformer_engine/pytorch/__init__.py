"""Transformer Engine's torch modules, as many of them as Megatron's layers are made of."""

from transformer_engine.pytorch import distributed, fp8, ops
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.linears import GroupedLinear, LayerNormLinear, Linear
from transformer_engine.pytorch.norms import LayerNorm, RMSNorm
from transformer_engine.pytorch.padding import Fp8Padding, Fp8Unpadding
from transformer_engine.pytorch.user_buffers import UserBufferQuantizationMode, destroy_ub, initialize_ub

__all__ = [
    "DotProductAttention", "Fp8Padding", "Fp8Unpadding", "GroupedLinear", "LayerNorm", "LayerNormLinear",
    "Linear", "RMSNorm", "UserBufferQuantizationMode", "destroy_ub", "distributed", "fp8", "fp8_autocast",
    "fp8_model_init", "initialize_ub", "ops",
]  # fmt: skip
