"""Scaled dot product attention of dense batches and of packed sequences.

Legend: L queries of a sequence, B sequences, T tokens, H query heads, G KV heads, D and E head dims.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.linears import TransformerEngineBaseModule

_CAUSAL = {"causal": 0, "padding_causal": 0, "causal_bottom_right": 1, "padding_causal_bottom_right": 1}


class DotProductAttention(TransformerEngineBaseModule):
    """Attention without projections; this rank has ``num_attention_heads // tp_size`` of the heads."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int | tuple[int, int], num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None, sequence_parallel: bool = False, tp_size: int = 1,
        get_rng_state_tracker: Any = None, tp_group: Any = None, layer_number: int | None = None,
        attention_type: str = "self", cp_group: Any = None, cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None, cp_comm_type: str = "p2p", softmax_scale: float | None = None,
        softmax_type: str = "vanilla", return_max_logit: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        assert attention_dropout == 0.0 and window_size in (None, (-1, -1), (-1, 0)), "not in the reference"
        assert attention_type == "self" and softmax_type == "vanilla", "not in the reference"
        assert cp_group is None and not return_max_logit, "not in the reference"
        sizes = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = sizes
        self.num_heads = num_attention_heads // tp_size
        self.num_groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.softmax_scale = sizes[0] ** -0.5 if softmax_scale is None else softmax_scale
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.register_load_state_dict_post_hook(_may_lack_extra_state)

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor,
        attention_mask: Tensor | None = None, qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None, cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None, attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None, checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias", core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None, fast_zero_fill: bool = True, inference_params: Any = None,
        pad_between_seqs: bool | None = None, fp8_output: bool = False, num_splits: int | None = 1,
    ) -> Tensor:  # fmt: skip
        """Format "sbhd": query [L, B, H, D] to [L, B, H*E]. "thd": query [T, H, D] to [T, H*E], with sequence
        i between ``cu_seqlens[i]`` and ``cu_seqlens[i + 1]``, int32 on the tensors' device.
        """
        assert window_size is None and core_attention_bias is None, "not in the reference"
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None, "not in the reference"
        assert query_layer.dtype == key_layer.dtype == value_layer.dtype
        assert query_layer.shape[-2:] == (self.num_heads, self.hidden_size_per_attention_head_k)
        assert key_layer.shape[-2:] == (self.num_groups, self.hidden_size_per_attention_head_k)
        assert value_layer.shape[-2:] == (self.num_groups, self.hidden_size_per_attention_head_v)
        mask_type = attn_mask_type or self.attn_mask_type
        if (qkv_format or self.qkv_format) == "sbhd":
            assert mask_type == "causal" and cu_seqlens_q is None
            dense = [x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer)]
            return _attend(*dense, mask_type, self.softmax_scale).permute(2, 0, 1, 3).flatten(2)
        assert (qkv_format or self.qkv_format) == "thd" and mask_type.startswith("padding_causal")
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        lengths_q, lengths_kv = cu_seqlens_q.diff().tolist(), cu_seqlens_kv.diff().tolist()
        assert sum(lengths_q) == query_layer.shape[0] and sum(lengths_kv) == key_layer.shape[0]
        assert max_seqlen_q == max(lengths_q) and max_seqlen_kv == max(lengths_kv)
        sequences = zip(
            query_layer.split(lengths_q), key_layer.split(lengths_kv), value_layer.split(lengths_kv),
            strict=True,
        )  # fmt: skip
        batches = ((x.transpose(0, 1)[None] for x in each) for each in sequences)
        parts = [_attend(*batch, mask_type, self.softmax_scale) for batch in batches]
        return torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts])


def _may_lack_extra_state(module: nn.Module, incompatible_keys: Any) -> None:
    """Attention loads from checkpoints without its extra state, which Megatron writes none of."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("core_attention._extra_state")]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask_type: str, scale: float) -> Tensor:
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    shift = (num_keys - num_queries) * _CAUSAL[mask_type]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(shift)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
