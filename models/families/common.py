"""Reading a Hugging Face config: the fields that every decoder has, and the checks that most need."""

from collections.abc import Mapping
from typing import Any

from mtrl.models.config import MoeConfig, require
from mtrl.parallel.errors import ModelError

Fields = dict[str, Any]


def decoder_fields(
    hf: Mapping[str, Any], *, family: str, norm_eps: float = 1e-6, num_kv_heads: int | None = None
) -> Fields:
    """The ``ModelConfig`` fields that are read alike in every family.

    ``norm_eps`` is what a config means that does not say; ``num_kv_heads`` overrules the config. Defaults of
    transformers for sizes are other models' sizes, so a config must say them; ``null`` KV heads are as many
    as heads.

    Raises:
        ModelError: a size is missing.
    """
    hidden, heads = int(require(hf, "hidden_size")), int(require(hf, "num_attention_heads"))
    return {
        "family": family,
        "num_layers": int(require(hf, "num_hidden_layers")),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": int(num_kv_heads or present(hf, "num_key_value_heads") or heads),
        "head_dim": int(hf.get("head_dim") or hidden // heads),
        "intermediate_size": int(require(hf, "intermediate_size")),
        "vocab_size": int(require(hf, "vocab_size")),
        "max_position_embeddings": int(require(hf, "max_position_embeddings")),
        "norm_eps": float(hf.get("rms_norm_eps", norm_eps)),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "hf_config": hf,
    }


def present(hf: Mapping[str, Any], key: str) -> Any:
    """``hf[key]``, which may be None; a ModelError if it is not there."""
    return hf[key] if key in hf else require(hf, key)


def refuse(hf: Mapping[str, Any], name: str, **wanted: Any) -> None:
    """Check fields that only one value is supported for; a field that is absent has it.

    Raises:
        ModelError: one has another value; the message names the field and both values.
    """
    for key, value in wanted.items():
        found = hf.get(key, value)
        if found != value and not (value in (None, False) and not found):
            raise ModelError(f"{name} with {key} {found!r} is not supported; only {value!r}")


def refuse_windows(hf: Mapping[str, Any], name: str) -> None:
    """Check that no entry of ``layer_types`` asks for a window. ModelError if one does."""
    windowed = sorted({kind for kind in hf.get("layer_types") or () if kind != "full_attention"})
    if windowed:
        raise ModelError(f"{name} with layer_types {windowed} is not supported; only 'full_attention'")


def num_prediction_layers(hf: Mapping[str, Any]) -> int:
    """Multi-token prediction layers, by either name of the key; one if it is not said, as in transformers."""
    found = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 1))
    return int(found or 0)


def sparse_moe(hf: Mapping[str, Any], **more: Any) -> MoeConfig:
    """Qwen's mixture: a layer is one every ``decoder_sparse_step`` layers, unless listed as dense."""
    step, dense = int(hf.get("decoder_sparse_step", 1)), set(hf.get("mlp_only_layers") or ())
    layers = range(int(require(hf, "num_hidden_layers")))
    return MoeConfig(
        num_experts=num_experts(hf),
        top_k=int(require(hf, "num_experts_per_tok")),
        expert_hidden_size=int(require(hf, "moe_intermediate_size")),
        normalize_top_k=bool(hf.get("norm_topk_prob", False)),
        moe_layers=tuple(n for n in layers if n not in dense and (n + 1) % step == 0),
        **more,
    )


def num_experts(hf: Mapping[str, Any]) -> int:
    """Routed experts, by the name the config uses; transformers 5 writes another than it used to."""
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    found = next((hf[name] for name in names if hf.get(name)), None)
    if found is None:
        raise ModelError(
            f"config.json has no 'num_experts' (nor 'num_local_experts', 'n_routed_experts'), which "
            f"{hf.get('architectures')} needs"
        )
    return int(found)
