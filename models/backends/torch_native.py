"""The backend that runs everywhere: plain torch modules where Megatron-Core's own need CUDA or
Transformer Engine. Linear layers, embeddings, router and dispatcher are Megatron-Core's.

Legend: T tokens, S segments, L padded length, H query heads, G KV heads, D head dim, E local experts,
F hidden size, J expert hidden size on this rank.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig
from mtrl.models.packed import PackedSegments
from mtrl.models.weight_map import Places
from mtrl.parallel.megatron_ready import MEGATRON_0_19

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

_LAYER = "decoder.layers.{layer}."


def places(config: ModelConfig) -> Places:
    """Where this backend keeps each role."""
    heads = config.num_attention_heads // config.num_kv_heads
    qkv = _LAYER + "self_attention.linear_qkv.weight"
    fc1 = _LAYER + "mlp.linear_fc1.weight"
    expert_fc1 = _LAYER + "mlp.experts.weight1"
    return {
        "embedding": Place(name="embedding.word_embeddings.weight", pattern="v h"),
        "lm_head": Place(name="output_layer.weight", pattern="v h"),
        "final_norm": Place(name="decoder.final_layernorm.weight", pattern="h"),
        "attention.norm": Place(name=_LAYER + "input_layernorm.weight", pattern="h"),
        "attention.query": Place(name=qkv, pattern="(g r d) h", within=(("r", 0, heads + 2),)),
        "attention.key": Place(name=qkv, pattern="(g k d) h", within=(("k", heads, heads + 2),)),
        "attention.value": Place(name=qkv, pattern="(g k d) h", within=(("k", heads + 1, heads + 2),)),
        "attention.output": Place(name=_LAYER + "self_attention.linear_proj.weight", pattern="h (g r d)"),
        "attention.query_norm": Place(name=_LAYER + "self_attention.q_layernorm.weight", pattern="d"),
        "attention.key_norm": Place(name=_LAYER + "self_attention.k_layernorm.weight", pattern="d"),
        "mlp.norm": Place(name=_LAYER + "pre_mlp_layernorm.weight", pattern="h"),
        "mlp.gate": Place(name=fc1, pattern="(u i) h", within=(("u", 0, 2),)),
        "mlp.up": Place(name=fc1, pattern="(u i) h", within=(("u", 1, 2),)),
        "mlp.down": Place(name=_LAYER + "mlp.linear_fc2.weight", pattern="h i"),
        "moe.router": Place(name=_LAYER + "mlp.router.weight", pattern="n h"),
        "expert.gate": Place(name=expert_fc1, pattern="e (u j) h", within=(("u", 0, 2),)),
        "expert.up": Place(name=expert_fc1, pattern="e (u j) h", within=(("u", 1, 2),)),
        "expert.down": Place(name=_LAYER + "mlp.experts.weight2", pattern="e h j"),
    }


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) over the last dim, right under sequence parallelism.

    Megatron's torch fall-back refuses sequence parallelism. All it takes is the mark on the weight:
    each tensor parallel rank sees its share of the tokens, so Megatron sums the gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` [..., hidden]; same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class CoreAttention(nn.Module):
    """Causal grouped-query attention over packed segments or a dense batch, by torch's SDPA."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *args: Any, softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend. Packed: query [T, H, D], key and value [T, G, D], result [T, H*D]. Dense: query
        [L, S, H, D], result [L, S, H*D]. The mask argument is not used: attention is causal.
        """
        if packed_seq_params is None:
            dense = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            return self._attend(*dense).permute(2, 0, 1, 3).flatten(2)
        assert packed_seq_params.scatter_T is not None, "packed sequences come as PackedSegments"
        outputs = []
        for bucket in packed_seq_params.buckets:
            index = bucket.gather_SL.flatten()
            batch = [
                x.index_select(0, index).view(*bucket.gather_SL.shape, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            ]
            outputs.append(self._attend(*batch).transpose(1, 2).flatten(0, 1))
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return rows.index_select(0, packed_seq_params.scatter_T).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip


class PackedRotary(RotaryEmbedding):  # type: ignore[misc]
    """Megatron's rotary embedding, at the positions of packed segments.

    Megatron builds packed frequencies by a Python loop over segments, twice a layer. Here they are
    one gather a forward pass: GPTModel asks for a length and hands it back, so the packed sequences
    themselves travel as that length.
    """

    def get_rotary_seq_len(  # noqa: D102
        self, inference_context: Any, transformer: Any, transformer_input: Any, transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> Any:  # fmt: skip
        if isinstance(packed_seq_params, PackedSegments):
            return packed_seq_params
        return super().get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params
        )

    def forward(self, max_seq_len: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Frequencies [T, 1, 1, D] of packed segments, or Megatron's own for a length."""
        if not isinstance(max_seq_len, PackedSegments):
            dense: torch.Tensor = super().forward(max_seq_len, *args, **kwargs)
            return dense
        assert max_seq_len.positions_T is not None
        positions_T = max_seq_len.positions_T.to(self.inv_freq.dtype)
        freqs: torch.Tensor = torch.outer(positions_T, self.inv_freq)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]


class GroupedExperts(nn.Module):
    """SwiGLU experts of this rank as two stacked weights and two grouped matrix products.

    Tokens come sorted by expert from Megatron's dispatcher, which also gathers them over ``ffn.etp``
    before and reduce-scatters after, so nothing here communicates. ``weight1`` is [E, 2*J, F] (gate,
    then up), ``weight2`` is [E, F, J]: the layout of the checkpoint, so that loading never transposes.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **unused: Any
    ) -> None:
        super().__init__()
        etp, ep = pg_collection.expt_tp.size(), pg_collection.ep.size()
        hidden, expert_hidden = config.hidden_size, config.moe_ffn_hidden_size // etp
        self.num_local_experts = num_local_experts
        self.activation = config.activation_func
        shape1 = (num_local_experts, 2 * expert_hidden, hidden)
        shape2 = (num_local_experts, hidden, expert_hidden)
        self.weight1 = nn.Parameter(torch.empty(shape1, dtype=config.params_dtype))
        self.weight2 = nn.Parameter(torch.empty(shape2, dtype=config.params_dtype))
        is_folded = ep > 1 or etp != config.tensor_model_parallel_size
        for weight, dim in ((self.weight1, 1), (self.weight2, 2)):
            # Megatron's marks: which groups reduce the gradient, and that etp ranks hold distinct parts.
            weight.allreduce = not is_folded  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim, weight.partition_stride = dim, 1  # type: ignore[attr-defined]

    def forward(
        self, x_TF: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply expert e to its tokens and scale by the router's probability.

        Args:
            x_TF: tokens sorted by expert.
            tokens_per_expert: [E] integers that sum to T.
            probs_T: the probability with which each token chose its expert.

        Returns:
            The output [T, F] and no bias.
        """
        counts_E = torch.as_tensor(tokens_per_expert, device=x_TF.device)
        gate_up = grouped_linear(x_TF, self.weight1, counts_E)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = self.activation(gate) * up * probs_T.unsqueeze(-1)
        return grouped_linear(hidden.to(x_TF.dtype), self.weight2, counts_E), None


def grouped_linear(x_TF: torch.Tensor, weight_EOF: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """``x @ weight[e].T`` for the tokens of each expert e, which lie together in ``x_TF``.

    torch's grouped product takes only rows that are a multiple of 16 bytes long, and on a GPU only
    bf16; everything else goes expert by expert.
    """
    row_bytes = [size * x_TF.element_size() for size in weight_EOF.shape[1:]]
    if any(num_bytes % 16 for num_bytes in row_bytes) or (x_TF.is_cuda and x_TF.dtype != torch.bfloat16):
        parts = x_TF.split(counts_E.tolist())
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOF, strict=True)])
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_TF, weight_EOF.transpose(1, 2), offs=ends_E)


class TorchNativeProvider(LocalSpecProvider):  # type: ignore[misc]
    """Tells Megatron's spec builders to use the modules of this file."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """The norm of every place."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention without projections."""
        return CoreAttention

    def grouped_mlp_modules(self, *unused: Any) -> Any:
        """The experts: a builder for Megatron 0.19, a (module, submodules) pair before."""
        return functools.partial(GroupedExperts) if MEGATRON_0_19 else (GroupedExperts, None)
