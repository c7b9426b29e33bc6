"""Transformer Engine's attention over packed samples, with rows shared over context parallel ranks.

Legend: T this rank's tokens, A all ranks' tokens of a row, H query heads, G KV heads, D and E head dims.
"""

import copy
import enum
from typing import Any

import torch
import torch.nn.functional as F

from mtrl.models.packed import PackedSegments, Spans

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


class _BottomRight(enum.Enum):
    """A mask that Transformer Engine has and Megatron's enum lacks: the last query sees all keys."""

    padding_causal_bottom_right = 1


class CoreAttention(TEDotProductAttention):  # type: ignore[misc]
    """Attention without projections.

    Transformer Engine is not told of context parallelism: its own cuts each sample into chunks, ours the row
    (docs/decisions/0007). Every rank gathers all keys and values, and attends from each run of its queries to
    the keys of their sample up to the run's end: sequences of unequal lengths, which Transformer Engine's
    kernels take without padding. Values of latent attention are padded to the keys' head dim, which its
    kernels ask for in packed samples, as Megatron does from 0.19 on.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: Any = None, **kwargs: Any
    ) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        if "k_channels" in kwargs:
            kwargs["v_channels"] = kwargs["k_channels"]
        super().__init__(alone, *args, pg_collection=pg_collection, **kwargs)
        self.gather_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSegments | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend. Packed: query [T, H, D], key [T, G, D], value [T, G, E], result [T, H*E]. Dense: query
        [L, B, H, D], result [L, B, H*E]. The mask arguments are not used: attention is causal.
        """
        if packed_seq_params is None:
            assert self.gather_group is None, "context parallel tokens come packed"
            return self._attend(query, key, value, AttnMaskType.causal, None)
        spans = packed_seq_params.spans
        if self.gather_group is None:
            return self._attend(query, key, value, AttnMaskType.causal, _as_megatron(spans))
        key, value = self._seen(key, value, spans)
        return self._attend(query, key, value, _BottomRight.padding_causal_bottom_right, _as_megatron(spans))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, packed: Any
    ) -> torch.Tensor:
        lacking = key.shape[-1] - value.shape[-1]
        padded = F.pad(value, (0, lacking)) if lacking else value
        found: torch.Tensor = super().forward(
            query, key, padded, None, attn_mask_type=mask, packed_seq_params=packed
        )
        if not lacking:
            return found
        by_head = found.view(*found.shape[:-1], query.shape[-2], key.shape[-1])
        return by_head[..., : value.shape[-1]].flatten(-2)

    def _seen(
        self, key: torch.Tensor, value: torch.Tensor, spans: Spans
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that this rank's queries see, span by span, gathered as one message; gradients
        go back by a reduce-scatter.
        """
        both = torch.cat((key, value), dim=-1)
        both = gather_from_sequence_parallel_region(both, group=self.gather_group)
        both = both.index_select(0, spans.key_rows)
        return both[..., : key.shape[-1]].contiguous(), both[..., key.shape[-1] :].contiguous()


def _as_megatron(spans: Spans) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=spans.query_bounds,
        cu_seqlens_kv=spans.key_bounds,
        max_seqlen_q=spans.longest_query,
        max_seqlen_kv=spans.longest_key,
    )
