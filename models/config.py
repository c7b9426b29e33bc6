"""What mtrl knows of a model's shape, read from a Hugging Face ``config.json``. Pure: no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtrl.parallel.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The mixture-of-experts part of a model.

    ``moe_layers`` are the (0-based) layers whose MLP is a mixture; the others are dense.
    ``normalize_top_k``: the chosen experts' probabilities are rescaled to sum to 1.
    """

    num_experts: int
    top_k: int
    expert_hidden_size: int
    normalize_top_k: bool
    moe_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes in elements; ``moe`` is None for a dense model.

    ``hf_config`` is the Hugging Face dictionary it was read from, kept for exporting.
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
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qk_norm: bool
    moe: MoeConfig | None
    hf_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        object.__setattr__(self, "hf_config", MappingProxyType(dict(self.hf_config)))

    def extents(self) -> dict[str, int]:
        """Size of each weight symbol of ``roles.py`` in the whole model."""
        moe = self.moe
        return {
            "v": self.vocab_size,
            "h": self.hidden_size,
            "g": self.num_kv_heads,
            "r": self.num_attention_heads // self.num_kv_heads,
            "k": 1,
            "d": self.head_dim,
            "u": 1,
            "i": self.intermediate_size,
            "n": moe.num_experts if moe else 0,
            "e": moe.num_experts if moe else 0,
            "j": moe.expert_hidden_size if moe else 0,
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
        raise ModelError(f"no config.json at {path}; give a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def require(config: Mapping[str, Any], key: str) -> Any:
    """``config[key]``, or a ModelError that names the missing key."""
    value = config.get(key)
    if value is None:
        raise ModelError(f"config.json has no {key!r}, which {config.get('architectures')} needs")
    return value


def plain_rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base of a config without rope scaling, in the old or the transformers 5 layout.

    Raises:
        ModelError: the config asks for a scaled rope (yarn, llama3, ...), which this family's reader
            does not know.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ModelError(
            f"rope type {kind!r} is not supported for {config.get('architectures')}; only 'default'"
        )
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
