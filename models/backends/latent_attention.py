"""Latent attention with exactly the modules that a backend's spec names."""

from typing import Any

import mtrl.parallel.megatron_ready  # noqa: F401

from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)


class NamedLatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's, without what Megatron would choose itself."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        # Asked by Megatron 0.19, which otherwise insists on a norm fused into the query projection of models
        # without a query rank (DeepSeek-V2-Lite, Moonlight). Those have none.
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}
