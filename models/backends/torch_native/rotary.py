"""Rotary frequencies, at the positions of packed segments."""

from typing import Any

import torch

from mtrl.models.config import RopeConfig
from mtrl.models.packed import PackedSegments

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def inverse_frequencies(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dims, float32 [dim / 2]; and what cosines and sines are scaled by.

    Scaled kinds are computed by transformers' own functions, the reference for what a checkpoint means.
    """
    if rope.kind == "default":
        return 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), 1.0
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PreTrainedConfig(
        head_dim=dim, hidden_size=dim, num_attention_heads=1,
        max_position_embeddings=rope.default_length,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling},
    )  # fmt: skip
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope.kind](config, device=torch.device("cpu"))
    return frequencies.float(), float(scale)


class PackedRotary(RotaryEmbedding):  # type: ignore[misc]
    """Megatron's rotary embedding, at the positions of packed segments.

    Megatron builds packed frequencies by a Python loop over segments, twice a layer. Here they are
    one gather a forward pass: GPTModel asks for a length and hands it back, so the packed sequences
    themselves travel as that length. With ``gives_scale`` the result is (frequencies, scale), which is what
    latent attention with YaRN expects.
    """

    def __init__(
        self, rope: RopeConfig, dim: int, *, cp_group: Any, on_cpu: bool, gives_scale: bool = False
    ) -> None:
        super().__init__(
            kv_channels=dim, rotary_percent=rope.fraction, rotary_base=rope.theta,
            use_cpu_initialization=on_cpu, cp_group=cp_group,
        )  # fmt: skip
        own: torch.Tensor = super().__getattribute__("inv_freq")
        frequencies, self.scale = inverse_frequencies(rope, 2 * own.numel())
        self.inv_freq = frequencies.to(own.device)
        self.gives_scale = gives_scale

    def get_rotary_seq_len(  # noqa: D102
        self, inference_context: Any, transformer: Any, transformer_input: Any, transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> Any:  # fmt: skip
        if isinstance(packed_seq_params, PackedSegments):
            return packed_seq_params
        return super().get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params
        )

    def forward(self, max_seq_len: Any, *args: Any, **kwargs: Any) -> Any:
        """Frequencies [T, 1, 1, D] of packed segments (of the whole row, where context parallel ranks share
        it), or Megatron's own for a length.
        """
        freqs = self._frequencies(max_seq_len, *args, **kwargs)
        return (freqs, self.scale) if self.gives_scale else freqs

    def _frequencies(self, max_seq_len: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(max_seq_len, PackedSegments):
            dense: torch.Tensor = super().forward(max_seq_len, *args, **kwargs)
            return dense
        assert max_seq_len.positions_T is not None
        positions_T = max_seq_len.positions_T.to(self.inv_freq.dtype)
        freqs: torch.Tensor = torch.outer(positions_T, self.inv_freq)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]
