"""Causal grouped-query attention over packed segments or a dense batch, by torch's SDPA.

Legend: T this rank's tokens, S segments, L padded queries and K padded keys of a segment, H query heads,
G KV heads, D and E the head dims of keys and of values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mtrl.models.packed import PackedSegments, SegmentBucket

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class CoreAttention(nn.Module):
    """Attention without projections.

    ``window`` > 0 is how many keys a query sees, itself included. ``has_sinks``: a learned logit per head
    joins each softmax and takes no value. Under context parallelism every rank keeps its queries and gathers
    all keys and values; the gradient goes back by a reduce-scatter.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *args: Any, softmax_scale: float | None = None,
        pg_collection: Any = None, window: int = 0, has_sinks: bool = False, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.softmax_scale, self.window, self.layer_number = softmax_scale, window, layer_number
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        self.softmax_offset: nn.Parameter | None = None
        if has_sinks:
            num_heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype))
            self.softmax_offset.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.softmax_offset.partition_dim = 0  # type: ignore[attr-defined]
            self.softmax_offset.partition_stride = 1  # type: ignore[attr-defined]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend. Packed: query [T, H, D], key [T, G, D], value [T, G, E], result [T, H*E]. Dense: query
        [L, S, H, D], result [L, S, H*E]. The mask argument is not used: attention is causal.
        """
        if packed_seq_params is None:
            assert self.cp_group is None or self.cp_group.size() == 1, "context parallel tokens come packed"
            dense = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            mask = _dense_mask(query.shape[0], self.window, query.device)
            return self._attend(dense[0], dense[1], dense[2], mask).permute(2, 0, 1, 3).flatten(2)
        assert packed_seq_params.scatter_T is not None, "packed sequences come as PackedSegments"
        if self.cp_group is not None and self.cp_group.size() > 1:
            key, value = self._gather(key, value)
        outputs = []
        for bucket in packed_seq_params.buckets:
            batch = [
                (x if packed_seq_params.is_dense else x.index_select(0, index.flatten()))
                .view(*index.shape, *x.shape[1:])
                .transpose(1, 2)
                for x, index in ((query, bucket.query_SL), (key, bucket.key_SK), (value, bucket.key_SK))
            ]
            attended = self._attend(batch[0], batch[1], batch[2], self._mask(bucket))
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        if packed_seq_params.is_dense:
            return outputs[0].flatten(1)
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return rows.index_select(0, packed_seq_params.scatter_T).flatten(1)

    def _gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' keys and values, in rank order, as one message."""
        both = torch.cat((key, value), dim=-1)
        both = gather_from_sequence_parallel_region(both, group=self.cp_group)
        return both[..., : key.shape[-1]], both[..., key.shape[-1] :]

    def _mask(self, bucket: SegmentBucket) -> torch.Tensor | None:
        """Which keys each query sees, [S, 1, L, K]; None where plain causal order says it."""
        if bucket.is_whole and not self.window:
            return None
        distance_SLK = bucket.query_offsets_SL[:, :, None] - torch.arange(
            bucket.key_SK.shape[1], device=bucket.key_SK.device
        )
        mask_SLK = distance_SLK >= 0
        if self.window:
            mask_SLK &= distance_SLK < self.window
        return mask_SLK[:, None]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.softmax_offset is not None:
            return self._attend_with_sinks(query, key, value, mask)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    def _attend_with_sinks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Softmax over each query's keys and its head's sink, written out: SDPA has no sinks."""
        assert self.softmax_offset is not None
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scale = self.softmax_scale if self.softmax_scale is not None else query.shape[-1] ** -0.5
        logits = (query @ key.transpose(-1, -2)) * scale
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        sinks = self.softmax_offset.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits.dtype)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.cat((logits, sinks), dim=-1).softmax(-1, dtype=dtype)
        return weights[..., :-1].to(value.dtype) @ value


def _dense_mask(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    if not window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)
