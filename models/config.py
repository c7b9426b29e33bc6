"""What mtrl knows of a model's shape, read from a Hugging Face ``config.json``. Pure: no torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mtrl.parallel.errors import ModelError

LATENT_NORM_EPS = 1e-6
"""Of norms inside latent attention: transformers leaves its default, whatever the config says of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864).

    ``kind`` and ``scaling`` are Hugging Face's ``rope_type`` and the other entries of ``rope_parameters``.
    ``fraction`` of each head's dims is rotated. ``default_length`` is the length before scaling, used where
    ``scaling`` names no ``original_max_position_embeddings``.
    """

    theta: float
    kind: str = "default"
    fraction: float = 1.0
    default_length: int = 0
    scaling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1).

    ``query_rank`` is None where queries are projected in one step. A query or key head has ``nope_dim``
    dims without and ``rope_dim`` dims with rotary position, a value head ``value_dim``.
    """

    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The mixture-of-experts part of a model.

    ``moe_layers`` are the (0-based) layers whose MLP is a mixture; the others are dense. ``score`` turns
    the router's logits into scores over all experts. ``normalize_top_k``: the chosen experts' scores are
    rescaled to sum to 1, then multiplied by ``scale``. ``selection_bias``: each expert has a bias that counts
    in choosing and not in weighing (DeepSeek-V3's load balancing, arXiv 2408.15664). With ``num_groups`` > 1
    experts are chosen from the best ``top_groups`` groups only. ``shared_hidden_size`` > 0 is an expert that
    every token visits; ``shared_gate`` multiplies its output by a sigmoid of the token.
    """

    num_experts: int
    top_k: int
    expert_hidden_size: int
    normalize_top_k: bool
    moe_layers: tuple[int, ...]
    score: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    shared_hidden_size: int = 0
    shared_gate: bool = False


QkNorm = Literal["none", "head", "all_heads"]
"""RMSNorm of queries and keys: none, over each head's dims, or over the dims of all heads together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes in elements; ``moe`` is None for a dense model.

    ``qkv_bias``: queries, keys and values have a bias; ``linear_bias``: every other linear layer too, the
    router and the experts included. ``sinks``: a learned logit per head joins each softmax and takes no value
    (arXiv 2309.17453). ``windows[layer]``, where there are any, is how many keys a query sees, itself
    included; 0 is all. ``activation`` ``"clamped_swiglu"`` is gpt-oss's. ``num_prediction_layers``: how many
    multi-token prediction layers (arXiv 2412.19437, section 2.2) a checkpoint may hold after the last; they
    are carried from load to export, not computed. ``hf_config`` is the Hugging Face dictionary it was read
    from, kept for exporting.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope: RopeConfig
    norm_eps: float
    tie_embeddings: bool
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    linear_bias: bool = False
    sinks: bool = False
    windows: tuple[int, ...] = ()
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    num_prediction_layers: int = 0
    hf_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        object.__setattr__(self, "hf_config", MappingProxyType(dict(self.hf_config)))

    def extents(self) -> dict[str, int]:
        """Size of each weight symbol of ``roles.py`` in the whole model."""
        moe, mla = self.moe, self.mla
        return {
            "v": self.vocab_size,
            "h": self.hidden_size,
            "g": self.num_kv_heads,
            "r": self.num_attention_heads // self.num_kv_heads,
            "k": 1,
            "d": self.head_dim,
            "q": self.num_attention_heads * self.head_dim,
            "l": self.num_kv_heads * self.head_dim,
            "u": 1,
            "c": 2,
            "o": 1,
            "i": self.intermediate_size,
            "n": moe.num_experts if moe else 0,
            "e": moe.num_experts if moe else 0,
            "j": moe.expert_hidden_size if moe else 0,
            "s": moe.shared_hidden_size if moe else 0,
            "m": self.num_attention_heads,
            "a": (mla.query_rank or 0) if mla else 0,
            "b": mla.kv_rank + mla.rope_dim if mla else 0,
            "B": mla.kv_rank if mla else 0,
            "x": mla.nope_dim + mla.rope_dim if mla else 0,
            "y": mla.nope_dim + mla.value_dim if mla else 0,
            "w": mla.value_dim if mla else 0,
        }

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers whose MLP is a mixture of experts."""
        return self.moe.moe_layers if self.moe else ()

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers whose MLP is dense."""
        return tuple(layer for layer in range(self.num_layers) if layer not in set(self.moe_layers))


def read_hf_config(path: Path) -> dict[str, Any]:
    """The dictionary in ``path`` (a ``config.json``, or a folder that holds one).

    Raises:
        ModelError: there is no such file, or it is not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no config.json at {path}; give a Hugging Face model folder{_download_hint(path)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def _download_hint(path: Path) -> str:
    """How to get the model, where ``path`` looks like its name on the Hugging Face hub."""
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        return ""
    return f". Nothing is downloaded; get it with: hf download {path} --local-dir {path}"


def require(config: Mapping[str, Any], key: str) -> Any:
    """``config[key]``, or a ModelError that names the missing key."""
    value = config.get(key)
    if value is None:
        raise ModelError(f"config.json has no {key!r}, which {config.get('architectures')} needs")
    return value


def read_rope(
    config: Mapping[str, Any],
    *,
    kinds: tuple[str, ...],
    theta: float = 10000.0,
    fraction: float | None = None,
) -> RopeConfig:
    """The rotary settings of a config, in the old or the transformers 5 layout.

    Args:
        config: the Hugging Face dictionary.
        kinds: the ``rope_type`` values that the family's models are known to use.
        theta: transformers' default base for this architecture.
        fraction: its default fraction of rotated dims; None for an architecture that always rotates all.

    Raises:
        ModelError: the config asks for a scaling that is not in ``kinds``, for one of each kind of layer, or
            for rotating a part where the architecture rotates all.
    """
    architectures = config.get("architectures")
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = sorted(key for key, value in rope.items() if isinstance(value, Mapping))
    if nested:
        raise ModelError(f"rotary settings by kind of layer ({nested}) are not supported for {architectures}")
    old_name = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or old_name or "default"
    if kind not in kinds:
        raise ModelError(f"rope type {kind!r} is not supported for {architectures}; only {', '.join(kinds)}")
    found = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    found = (fraction or 1.0) if found is None else float(found)
    if fraction is None and found != 1.0:
        raise ModelError(f"partial_rotary_factor {found} is not supported for {architectures}; only 1.0")
    return RopeConfig(
        theta=float(rope.pop("rope_theta", None) or config.get("rope_theta") or theta),
        kind=kind,
        fraction=found,
        default_length=int(config.get("max_position_embeddings") or 0),
        scaling=MappingProxyType({key: value for key, value in rope.items() if value is not None}),
    )
