"""Where the ``torch_native`` backend keeps each role: its parameters' names and how their dims lie."""

from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig
from mtrl.models.roles import Role
from mtrl.models.weight_map import Places

_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_MLP = _LAYER + "mlp."


def _at(name: str, pattern: str, **within: tuple[int, int]) -> Place:
    return Place(name=name, pattern=pattern, within=tuple((s, *where) for s, where in within.items()))


def places(config: ModelConfig) -> Places:
    """The place of every role there is; a model uses those that its weight table names."""
    return {**_model(), **_attention(config), **_latent_attention(), **_mlps()}


def _model() -> dict[Role, Place]:
    return {
        "embedding": _at("embedding.word_embeddings.weight", "v h"),
        "lm_head": _at("output_layer.weight", "v h"),
        "final_norm": _at("decoder.final_layernorm.weight", "h"),
        "attention.norm": _at(_LAYER + "input_layernorm.weight", "h"),
        "mlp.norm": _at(_LAYER + "pre_mlp_layernorm.weight", "h"),
    }


def _attention(config: ModelConfig) -> dict[Role, Place]:
    # One KV group's rows lie together: its query heads, its key head, its value head.
    heads = config.num_attention_heads // config.num_kv_heads
    group = heads + 2
    weight, bias = _ATTENTION + "linear_qkv.weight", _ATTENTION + "linear_qkv.bias"
    return {
        "attention.query": _at(weight, "(g r d) h", r=(0, group)),
        "attention.key": _at(weight, "(g k d) h", k=(heads, group)),
        "attention.value": _at(weight, "(g k d) h", k=(heads + 1, group)),
        "attention.query_bias": _at(bias, "(g r d)", r=(0, group)),
        "attention.key_bias": _at(bias, "(g k d)", k=(heads, group)),
        "attention.value_bias": _at(bias, "(g k d)", k=(heads + 1, group)),
        "attention.output": _at(_ATTENTION + "linear_proj.weight", "h (g r d)"),
        "attention.output_bias": _at(_ATTENTION + "linear_proj.bias", "h"),
        "attention.query_norm": _at(_ATTENTION + "q_layernorm.weight", "d"),
        "attention.key_norm": _at(_ATTENTION + "k_layernorm.weight", "d"),
        "attention.query_norm_all": _at(_ATTENTION + "q_layernorm.weight", "q"),
        "attention.key_norm_all": _at(_ATTENTION + "k_layernorm.weight", "l"),
        "attention.sinks": _at(_ATTENTION + "core_attention.softmax_offset", "(g r)"),
    }


def _latent_attention() -> dict[Role, Place]:
    return {
        "mla.query": _at(_ATTENTION + "linear_q_proj.weight", "(m x) h"),
        "mla.query_down": _at(_ATTENTION + "linear_q_down_proj.weight", "a h"),
        "mla.query_down_norm": _at(_ATTENTION + "q_layernorm.weight", "a"),
        "mla.query_up": _at(_ATTENTION + "linear_q_up_proj.weight", "(m x) a"),
        "mla.kv_down": _at(_ATTENTION + "linear_kv_down_proj.weight", "b h"),
        "mla.kv_down_norm": _at(_ATTENTION + "kv_layernorm.weight", "B"),
        "mla.kv_up": _at(_ATTENTION + "linear_kv_up_proj.weight", "(m y) B"),
        "mla.output": _at(_ATTENTION + "linear_proj.weight", "h (m w)"),
    }


def _mlps() -> dict[Role, Place]:
    fc1, expert_fc1 = _MLP + "linear_fc1.weight", _MLP + "experts.weight1"
    shared_fc1 = _MLP + "shared_experts.linear_fc1.weight"
    return {
        "mlp.gate": _at(fc1, "(u i) h", u=(0, 2)),
        "mlp.up": _at(fc1, "(u i) h", u=(1, 2)),
        "mlp.down": _at(_MLP + "linear_fc2.weight", "h i"),
        "moe.router": _at(_MLP + "router.weight", "n h"),
        "moe.router_bias": _at(_MLP + "router.bias", "n"),
        "moe.selection_bias": _at(_MLP + "router.expert_bias", "n"),
        "expert.gate": _at(expert_fc1, "e (u j) h", u=(0, 2)),
        "expert.up": _at(expert_fc1, "e (u j) h", u=(1, 2)),
        "expert.gate_up": _at(expert_fc1, "e (c j) h"),
        "expert.gate_up_bias": _at(_MLP + "experts.bias1", "(e c j)"),
        "expert.down": _at(_MLP + "experts.weight2", "e h j"),
        "expert.down_bias": _at(_MLP + "experts.bias2", "(e h)"),
        "shared.gate": _at(shared_fc1, "(u s) h", u=(0, 2)),
        "shared.up": _at(shared_fc1, "(u s) h", u=(1, 2)),
        "shared.down": _at(_MLP + "shared_experts.linear_fc2.weight", "h s"),
        "shared.router": _at(_MLP + "shared_experts.gate_weight", "o h"),
    }
