"""The rows that most decoders share, by the names that most checkpoints use.

A family's table is a sum of these; what differs it writes itself. Every function takes the config and
gives the rows that its flags call for, so a model without biases has no rows for biases.
"""

from typing import Literal

from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig
from mtrl.models.families import Weight
from mtrl.models.roles import Role

LAYER = "model.layers.{layer}."


def row(
    role: Role,
    name: str,
    pattern: str,
    layers: tuple[int, ...] | None = None,
    *,
    dtype: Literal["float32"] | None = None,
) -> Weight:
    """One row; ``layers`` None is a weight of the whole model."""
    return Weight(role=role, place=Place(name=name, pattern=pattern), layers=layers, dtype=dtype)


def model_rows(config: ModelConfig) -> tuple[Weight, ...]:
    """Embedding, output layer, final norm, and the two norms of each layer."""
    embedding = "model.embed_tokens.weight"
    every = tuple(range(config.num_layers))
    return (
        row("embedding", embedding, "v h"),
        row("lm_head", embedding if config.tie_embeddings else "lm_head.weight", "v h"),
        row("final_norm", "model.norm.weight", "h"),
        row("attention.norm", LAYER + "input_layernorm.weight", "h", every),
        row("mlp.norm", LAYER + "post_attention_layernorm.weight", "h", every),
    )


def attention_rows(config: ModelConfig) -> tuple[Weight, ...]:
    """Grouped-query attention: projections, and the biases, norms and sinks that the config has."""
    at, every = LAYER + "self_attn.", tuple(range(config.num_layers))
    rows = [
        row("attention.query", at + "q_proj.weight", "(g r d) h", every),
        row("attention.key", at + "k_proj.weight", "(g k d) h", every),
        row("attention.value", at + "v_proj.weight", "(g k d) h", every),
        row("attention.output", at + "o_proj.weight", "h (g r d)", every),
    ]
    if config.qkv_bias:
        rows.append(row("attention.query_bias", at + "q_proj.bias", "(g r d)", every))
        rows.append(row("attention.key_bias", at + "k_proj.bias", "(g k d)", every))
        rows.append(row("attention.value_bias", at + "v_proj.bias", "(g k d)", every))
    if config.linear_bias:
        rows.append(row("attention.output_bias", at + "o_proj.bias", "h", every))
    if config.qk_norm == "head":
        rows.append(row("attention.query_norm", at + "q_norm.weight", "d", every))
        rows.append(row("attention.key_norm", at + "k_norm.weight", "d", every))
    if config.qk_norm == "all_heads":
        rows.append(row("attention.query_norm_all", at + "q_norm.weight", "q", every))
        rows.append(row("attention.key_norm_all", at + "k_norm.weight", "l", every))
    if config.sinks:
        rows.append(row("attention.sinks", at + "sinks", "(g r)", every))
    return tuple(rows)


def mlp_rows(config: ModelConfig) -> tuple[Weight, ...]:
    """The SwiGLU MLP of the dense layers."""
    at, layers = LAYER + "mlp.", config.dense_layers
    return (
        row("mlp.gate", at + "gate_proj.weight", "(u i) h", layers),
        row("mlp.up", at + "up_proj.weight", "(u i) h", layers),
        row("mlp.down", at + "down_proj.weight", "h i", layers),
    )


def moe_rows(
    config: ModelConfig,
    *,
    at: str = LAYER + "mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_experts",
) -> tuple[Weight, ...]:
    """Router, experts one by one, and the shared expert if there is one.

    ``names`` are the experts' gate, up and down projections below ``at + "experts.N."``.
    """
    moe, layers = config.moe, config.moe_layers
    if moe is None:
        return ()
    gate, up, down = (f"{at}experts.{{expert}}.{name}.weight" for name in names)
    rows = [
        row("moe.router", at + "gate.weight", "n h", layers),
        row("expert.gate", gate, "(u j) h", layers),
        row("expert.up", up, "(u j) h", layers),
        row("expert.down", down, "h j", layers),
    ]
    if moe.selection_bias:
        name = at + "gate.e_score_correction_bias"
        rows.append(row("moe.selection_bias", name, "n", layers, dtype="float32"))
    if moe.shared_hidden_size:
        rows.append(row("shared.gate", f"{at}{shared}.gate_proj.weight", "(u s) h", layers))
        rows.append(row("shared.up", f"{at}{shared}.up_proj.weight", "(u s) h", layers))
        rows.append(row("shared.down", f"{at}{shared}.down_proj.weight", "h s", layers))
    if moe.shared_gate:
        rows.append(row("shared.router", f"{at}{shared}_gate.weight", "o h", layers))
    return tuple(rows)


def fused_experts(table: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """The same table for a folder that transformers 5 wrote with ``save_original_format=False``.

    Experts are two tensors a layer, gate and up in one; every other name is as published, except that the
    mixture is always called ``mlp``.
    """
    at = LAYER + "mlp."
    rows = []
    for each in table:
        if each.role == "expert.gate":
            rows.append(row("expert.gate_up", at + "experts.gate_up_proj", "e (c j) h", each.layers))
        elif each.role == "expert.down":
            rows.append(row("expert.down", at + "experts.down_proj", "e h j", each.layers))
        elif each.role == "moe.router":
            rows.append(row("moe.router", at + "gate.weight", "n h", each.layers))
        elif each.role != "expert.up":
            rows.append(each)
    return tuple(rows)
