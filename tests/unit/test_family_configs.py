"""Every family's config: what mtrl reads is what transformers' config class understands, or it is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
import transformers

from mtrl.models.config import ModelConfig
from mtrl.models.families import family_of
from mtrl.parallel.errors import ModelError
from tests.family_toys import _SIZES, FAMILY_TOYS

pytestmark = pytest.mark.one_stack

# What transformers writes beside a model's own keys, or reads in training only.
NOT_OURS = {"architectures", "transformers_version", "_name_or_path", "dtype", "model_type"}


def written(name: str, **fields: object) -> dict[str, Any]:
    """The config.json of a toy, in transformers 5's layout."""
    prefix, own = FAMILY_TOYS[name]
    config = getattr(transformers, prefix + "Config")(**{**_SIZES, **own, **fields})
    return {**config.to_dict(), "architectures": [prefix + "ForCausalLM"]}


def older(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 wrote it."""
    old = {key: value for key, value in hf.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(hf["rope_parameters"])
    old["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    fraction = rope.pop("partial_rotary_factor", None)
    if fraction is not None:
        old["partial_rotary_factor"] = fraction
    for new_key, old_key in (
        ("num_local_experts", "num_experts"),
        ("num_mtp_layers", "num_nextn_predict_layers"),
    ):
        if new_key in old and hf["model_type"] not in ("mixtral", "gpt_oss"):
            old.setdefault(old_key, old.pop(new_key))
    return old | {
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "torch_dtype": "float32",
    }


def understood(hf: Mapping[str, Any]) -> dict[str, object]:
    """The sizes and choices that transformers' modules take from its config class."""
    prefix = hf["architectures"][0].removesuffix("ForCausalLM")
    config = getattr(transformers, prefix + "Config")(**{k: v for k, v in hf.items() if k not in NOT_OURS})
    heads, rope = config.num_attention_heads, dict(config.rope_parameters)
    found: dict[str, object] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "num_kv_heads": heads if prefix == "DeepseekV3" else config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "num_prediction_layers": getattr(config, "num_mtp_layers", 0),
        "theta": rope.pop("rope_theta"),
        "kind": rope.pop("rope_type"),
        "fraction": rope.pop("partial_rotary_factor", 1.0),
    }
    rope.pop("type", None)
    scaled = {key: value for key, value in rope.items() if value is not None}
    scaled.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    found["scaling"] = scaled
    sparse = getattr(config, "num_experts_per_tok", None)
    return found | (mixture(prefix, config) if sparse else {}) | attention(prefix, config)


def mixture(prefix: str, config: Any) -> dict[str, object]:
    layers = range(config.num_hidden_layers)
    if prefix in ("DeepseekV3", "Glm4Moe"):
        sparse = [layer for layer in layers if layer >= config.first_k_dense_replace]
        shared = config.n_shared_experts * config.moe_intermediate_size
    elif prefix in ("Qwen2Moe", "Qwen3Moe"):
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        sparse = [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
        shared = getattr(config, "shared_expert_intermediate_size", 0)
    else:
        sparse, shared = list(layers), 0
    return {
        "num_experts": getattr(config, "num_local_experts", None) or config.num_experts,
        "top_k": config.num_experts_per_tok,
        "expert_hidden_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "normalize_top_k": getattr(config, "norm_topk_prob", True),
        "moe_layers": tuple(sparse),
        "scale": getattr(config, "routed_scaling_factor", 1.0),
        "num_groups": getattr(config, "n_group", 1),
        "top_groups": getattr(config, "topk_group", 1),
        "shared_hidden_size": shared,
    }


def attention(prefix: str, config: Any) -> dict[str, object]:
    if prefix == "DeepseekV3":
        return {
            "query_rank": config.q_lora_rank,
            "kv_rank": config.kv_lora_rank,
            "nope_dim": config.qk_nope_head_dim,
            "rope_dim": config.qk_rope_head_dim,
            "value_dim": config.v_head_dim,
        }
    if prefix == "GptOss":
        windows = [config.sliding_window if kind == "sliding_attention" else 0 for kind in config.layer_types]
        return {"windows": tuple(windows)}
    if prefix == "Glm4Moe":
        norm = "head" if config.use_qk_norm else "none"
        return {"qkv_bias": config.attention_bias, "qk_norm": norm}
    return {"qkv_bias": config.qkv_bias} if prefix == "Qwen2Moe" else {}


def ours(config: ModelConfig, names: Mapping[str, object]) -> dict[str, object]:
    """The fields of those names, wherever in the config they are."""
    parts = [part for part in (config.moe, config.mla, config.rope, config) if part is not None]
    found: dict[str, object] = {
        name: next(getattr(part, name) for part in parts if hasattr(part, name)) for name in names
    }
    scaling = dict(config.rope.scaling)
    scaling.setdefault("original_max_position_embeddings", config.rope.default_length)
    return found | {"scaling": scaling}


def check(hf: Mapping[str, Any]) -> None:
    config = family_of(hf).read_config(hf)
    expected = understood(hf)
    assert ours(config, expected) == expected


@pytest.mark.parametrize("name", FAMILY_TOYS)
@pytest.mark.parametrize("layout", [dict, older])
def test_a_config_means_what_transformers_takes_it_for_in_its_old_and_new_layout(
    name: str, layout: Any
) -> None:
    check(layout(written(name)))


@pytest.mark.parametrize("name", FAMILY_TOYS)
@pytest.mark.parametrize("layout", [dict, older])
def test_a_key_left_out_means_its_default_or_is_asked_for(name: str, layout: Any) -> None:
    hf = layout(written(name))
    asked = set()
    for key in sorted(set(hf) - NOT_OURS):
        rest = {k: v for k, v in hf.items() if k != key}
        try:
            check(rest)
        except ModelError as error:
            assert key in str(error), f"{name} without {key}: {error}"
            asked.add(key)
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"} <= asked
    assert not asked & {
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
    }


def test_null_kv_heads_are_as_many_as_heads() -> None:
    for name in ("llama", "qwen2", "mixtral", "gpt oss"):
        hf = written(name) | {"num_key_value_heads": None}
        assert family_of(hf).read_config(hf).num_kv_heads == 8


def test_the_older_of_two_rotary_settings_counts_as_it_does_in_transformers() -> None:
    both = written("llama") | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}
    check(both)
    assert family_of(both).read_config(both).rope.kind == "linear"


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("llama", {"mlp_bias": True}, "Llama with mlp_bias True is not supported; only False"),
    ("llama", {"attention_bias": True}, "Llama with attention_bias True is not supported"),
    ("llama", {"hidden_act": "gelu"}, "Llama with hidden_act 'gelu' is not supported; only 'silu'"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rotary settings by kind of layer (['full_attention']) are not supported",
    ),
    ("qwen2", {"use_sliding_window": True}, "Qwen2 with use_sliding_window True"),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "Qwen2 with layer_types ['sliding",
    ),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "Qwen3 with layer_types ['sliding_attention']"),
    ("qwen2 moe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
    ("mixtral", {"sliding_window": 16}, "Mixtral with sliding_window 16 is not supported; only None"),
    ("mixtral", {"router_jitter_noise": 0.1}, "Mixtral with router_jitter_noise 0.1 is not supported"),
    ("olmoe", {"clip_qkv": 8.0}, "OLMoE with clip_qkv 8.0 is not supported; only None"),
    ("olmoe", {"attention_bias": True}, "OLMoE with attention_bias True is not supported"),
    ("glm4 moe", {"n_group": 2}, "GLM-4.5-MoE with n_group 2 is not supported; only 1"),
    ("glm4 moe", {"norm_topk_prob": False}, "GLM-4.5-MoE with norm_topk_prob False is not supported"),
    (
        "glm4 moe",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "rope type 'yarn' is not supported",
    ),
    ("deepseek v3", {"topk_method": "greedy"}, "DeepSeek-V3 with topk_method 'greedy' is not supported"),
    ("deepseek v3", {"scoring_func": "softmax"}, "DeepSeek-V3 with scoring_func 'softmax' is not supported"),
    ("deepseek v3", {"rope_interleave": False}, "DeepSeek-V3 with rope_interleave False is not supported"),
    ("deepseek v3", {"norm_topk_prob": False}, "DeepSeek-V3 with norm_topk_prob False is not supported"),
    ("deepseek v3", {"moe_layer_freq": 2}, "DeepSeek-V3 with moe_layer_freq 2 is not supported; only 1"),
    (
        "deepseek v3",
        {"num_experts_per_tok": 2},
        "num_experts_per_tok 2 with topk_group 2 of n_group 4: Megatron",
    ),
    ("gpt oss", {"swiglu_limit": 5.0}, "gpt-oss with swiglu_limit 5.0 is not supported; only 7.0"),
    ("gpt oss", {"attention_bias": False}, "gpt-oss with attention_bias False is not supported; only True"),
    ("gpt oss", {"layer_types": ["chunked_attention"] * 4}, "gpt-oss with layer_types ['chunked_attention'"),
    ("gpt oss", {"layer_types": ["full_attention"]}, "for 4 layers is not supported"),
    ("gpt oss", {"sliding_window": None}, "gpt-oss with sliding_window 0 is not supported"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_a_family_does_not_compute_is_refused(
    name: str, change: dict[str, object], message: str
) -> None:
    hf = written(name)
    family_of(hf).read_config(hf)
    with pytest.raises(ModelError) as raised:
        family_of(hf).read_config(hf | change)
    assert message in str(raised.value)


def test_what_a_config_says_in_either_wording_of_no_is_accepted() -> None:
    hf = written("olmoe") | {"clip_qkv": None, "attention_bias": None}
    family_of(hf).read_config(hf)


# The sizes of published models, as their config.json gives them, and billions of weights as they are known
# without multi-token prediction layers.
_DEEPSEEK_V3: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280, "torch_dtype": "bfloat16",
}  # fmt: skip
_MOONLIGHT = _DEEPSEEK_V3 | {
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264,
    "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0, "q_lora_rank": None, "rms_norm_eps": 1e-05, "rope_theta": 50000.0,
    "rope_scaling": None, "routed_scaling_factor": 2.446, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
_KIMI_K2 = _DEEPSEEK_V3 | {
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "DeepSeek-V3": (_DEEPSEEK_V3, 671.0),
    "Moonlight-16B-A3B": (_MOONLIGHT, 16.0),
    "Kimi-K2": (_KIMI_K2, 1026.4),
    "GLM-4.5-Air": (
        {
            "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
            "head_dim": 128, "hidden_act": "silu", "partial_rotary_factor": 0.5, "hidden_size": 4096,
            "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408,
            "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1,
            "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
            "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
            "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "use_qk_norm": False,
            "vocab_size": 151552,
        },
        106.9,
    ),
    "gpt-oss-20b": (
        {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
            "initial_context_length": 4096, "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
            "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
            "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
            },
            "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
            "vocab_size": 201088,
        },
        20.9,
    ),
    "Mixtral-8x7B": (
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e6,
            "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
        },
        46.7,
    ),
    "OLMoE-1B-7B": (
        {
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "clip_qkv": None,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
            "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
            "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
        6.9,
    ),
    "Qwen1.5-MoE-A2.7B": (
        {
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
            "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
            "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
            "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1e6,
            "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        14.3,
    ),
    "Llama-3.1-8B": (
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
        },
        8.0,
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1e6, "sliding_window": 32768,
            "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        0.5,
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
            "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
            "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        30.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_config_means_what_transformers_takes_it_for(model: str) -> None:
    check(PUBLISHED[model][0])
