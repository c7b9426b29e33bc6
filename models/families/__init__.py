"""The model families mtrl knows, each one short file: how its config reads and where its weights lie.

A family is data: a function from the Hugging Face config to ``ModelConfig`` and one from that to a
table of ``Weight`` rows. To add one from outside the repository, call ``register_family`` before the
model is built.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig, read_hf_config
from mtrl.models.roles import Role
from mtrl.parallel.errors import ModelError, MtrlError, UnknownFamilyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One row of a weight table: a role and where it lies in the checkpoint.

    ``layers`` are the layers that have it, or None for a weight of the whole model. ``dtype`` is what it is
    written in, whatever the others are.
    """

    role: Role
    place: Place
    layers: tuple[int, ...] | None = None
    dtype: Literal["float32"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture's config and weights are read.

    ``architectures`` are the names in ``config.json``'s ``architectures`` that it handles. ``weights`` is the
    table of the published format, which is also what is written; ``other_formats`` are tables of formats that
    are read too.
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    weights: Callable[[ModelConfig], tuple[Weight, ...]]
    other_formats: Callable[[ModelConfig], tuple[tuple[Weight, ...], ...]] = lambda config: ()


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make ``family`` known under its name. Returns it.

    Raises:
        ModelError: the name or one of the architectures is taken by another family.
    """
    for other in _FAMILIES.values():
        shared = set(other.architectures) & set(family.architectures)
        if other is not family and (other.name == family.name or shared):
            raise ModelError(f"family {family.name!r} collides with {other.name!r} {sorted(shared)}")
    _FAMILIES[family.name] = family
    return family


def known_architectures() -> dict[str, str]:
    """Architecture name -> family name, for all registered families."""
    return {name: family.name for family in _FAMILIES.values() for name in family.architectures}


def family_named(name: str) -> Family:
    """The registered family of that name."""
    if name not in _FAMILIES:
        raise UnknownFamilyError(f"no family {name!r}; known: {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that handles a Hugging Face config.

    Raises:
        UnknownFamilyError: none does; the message lists the architectures that are known.
    """
    given = hf_config.get("architectures") or ()
    architectures = tuple(map(str, given)) if isinstance(given, list | tuple) else (str(given),)
    known = known_architectures()
    for name in architectures:
        if name in known:
            return _FAMILIES[known[name]]
    raise UnknownFamilyError(
        f"no model family for architectures {list(architectures)}; known: {', '.join(sorted(known))}. "
        "Add one with mtrl.models.register_family."
    )


def load_model_config(path: Path) -> ModelConfig:
    """Read a Hugging Face folder's (or file's) ``config.json`` through its family.

    Raises:
        ModelError: it cannot be read, no family handles it, or a value in it is none that a model can have.
    """
    hf_config = read_hf_config(path)
    family = family_of(hf_config)
    try:
        return family.read_config(hf_config)
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        if isinstance(error, MtrlError):
            raise
        raise ModelError(
            f"{path}: config.json holds a value that {family.name} cannot have: {error}"
        ) from error


# Families register themselves when they are imported.
for _name in ("deepseek_v3", "glm4_moe", "gpt_oss", "llama", "mixtral", "olmoe", "qwen2", "qwen3"):
    importlib.import_module(f"{__name__}.{_name}")
