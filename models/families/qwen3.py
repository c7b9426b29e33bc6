"""Qwen3, dense and mixture-of-experts (``Qwen3ForCausalLM``, ``Qwen3MoeForCausalLM``).

Grouped-query attention with RMSNorm on each query and key head, no biases, SwiGLU; the MoE model
routes by softmax over all experts and, with ``norm_topk_prob``, rescales the chosen ones to sum to 1.
"""

from collections.abc import Mapping
from typing import Any

from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig, MoeConfig, plain_rope_theta, require
from mtrl.models.families import Family, Weight, register_family
from mtrl.parallel.errors import ModelError

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."


def _read_config(hf: Mapping[str, Any], moe: MoeConfig | None, family: str) -> ModelConfig:
    if hf.get("use_sliding_window"):
        raise ModelError("Qwen3 with use_sliding_window is not supported; no released Qwen3 model uses it")
    if hf.get("attention_bias"):
        raise ModelError("Qwen3 with attention_bias is not supported; no released Qwen3 model uses it")
    if hf.get("hidden_act", "silu") != "silu":
        raise ModelError(f"Qwen3 with hidden_act {hf['hidden_act']!r} is not supported; only 'silu'")
    hidden, heads = int(require(hf, "hidden_size")), int(require(hf, "num_attention_heads"))
    return ModelConfig(
        family=family,
        num_layers=int(require(hf, "num_hidden_layers")),
        hidden_size=hidden,
        num_attention_heads=heads,
        # transformers' defaults for these are other models' sizes, so a config must say them.
        num_kv_heads=int(require(hf, "num_key_value_heads")),
        head_dim=int(require(hf, "head_dim") if moe is None else hf.get("head_dim") or hidden // heads),
        intermediate_size=int(require(hf, "intermediate_size")),
        vocab_size=int(require(hf, "vocab_size")),
        max_position_embeddings=int(require(hf, "max_position_embeddings")),
        rope_theta=plain_rope_theta(hf),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qk_norm=True,
        moe=moe,
        hf_config=hf,
    )


def read_dense(hf: Mapping[str, Any]) -> ModelConfig:
    """``Qwen3ForCausalLM``'s config."""
    return _read_config(hf, None, "qwen3")


def read_moe(hf: Mapping[str, Any]) -> ModelConfig:
    """``Qwen3MoeForCausalLM``'s config; a layer is a mixture every ``decoder_sparse_step`` layers."""
    step, dense = int(hf.get("decoder_sparse_step", 1)), set(hf.get("mlp_only_layers") or ())
    num_layers = int(require(hf, "num_hidden_layers"))
    moe = MoeConfig(
        num_experts=int(
            hf.get("num_local_experts") or require(hf, "num_experts")
        ),  # transformers 5 renamed it
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=int(require(hf, "moe_intermediate_size")),
        normalize_top_k=bool(hf.get("norm_topk_prob", False)),
        moe_layers=tuple(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0),
    )
    return _read_config(hf, moe, "qwen3_moe")


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of both: a dense model simply has no mixture layers."""
    embedding = Place(name="model.embed_tokens.weight", pattern="v h")
    lm_head = embedding if config.tie_embeddings else Place(name="lm_head.weight", pattern="v h")
    every, dense, moe = tuple(range(config.num_layers)), config.dense_layers, config.moe_layers
    attention, mlp = _LAYER + "self_attn.", _LAYER + "mlp."

    def row(role: Any, name: str, pattern: str, layers: tuple[int, ...]) -> Weight:
        return Weight(role=role, place=Place(name=name, pattern=pattern), layers=layers)

    return (
        Weight(role="embedding", place=embedding),
        Weight(role="lm_head", place=lm_head),
        Weight(role="final_norm", place=Place(name="model.norm.weight", pattern="h")),
        row("attention.norm", _LAYER + "input_layernorm.weight", "h", every),
        row("attention.query", attention + "q_proj.weight", "(g r d) h", every),
        row("attention.key", attention + "k_proj.weight", "(g k d) h", every),
        row("attention.value", attention + "v_proj.weight", "(g k d) h", every),
        row("attention.output", attention + "o_proj.weight", "h (g r d)", every),
        row("attention.query_norm", attention + "q_norm.weight", "d", every),
        row("attention.key_norm", attention + "k_norm.weight", "d", every),
        row("mlp.norm", _LAYER + "post_attention_layernorm.weight", "h", every),
        row("mlp.gate", mlp + "gate_proj.weight", "(u i) h", dense),
        row("mlp.up", mlp + "up_proj.weight", "(u i) h", dense),
        row("mlp.down", mlp + "down_proj.weight", "h i", dense),
        row("moe.router", mlp + "gate.weight", "n h", moe),
        row("expert.gate", _EXPERT + "gate_proj.weight", "(u j) h", moe),
        row("expert.up", _EXPERT + "up_proj.weight", "(u j) h", moe),
        row("expert.down", _EXPERT + "down_proj.weight", "h j", moe),
    )


register_family(
    Family(name="qwen3", architectures=("Qwen3ForCausalLM",), read_config=read_dense, weights=weights)
)
register_family(
    Family(name="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), read_config=read_moe, weights=weights)
)
