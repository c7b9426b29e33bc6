"""YAML file + dotted overrides -> Config; every refusal says where the key stands.

omegaconf parses, merges and resolves ``${...}``; the tree and its types are ours (``config.py``).
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtrl.config import Config
from mtrl.config_types import Section, alternatives, check_value, describe, hints, section_of, sections
from mtrl.parallel.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
AnySection = TypeVar("AnySection", bound=Section)
Origins = dict[str, str]  # dotted key -> where it was written


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, lay ``overrides`` over it, check types and ranges.

    ``load_config("configs/quickstart.yaml", ["rollout.n_samples=16"]).rollout.n_samples`` is 16.
    Raises ConfigError for an unreadable file, an unknown key (with the closest one), a wrong type,
    a missing key or an interpolation that does not resolve. Later overrides win.
    """
    given, origins = _read_file(Path(path))
    for override in overrides:
        key, value = _parse_override(override)
        origins[key] = "command line"
        given = _merge(given, value, override)
    _refuse_missing(given, str(path))
    merged = _merge(OmegaConf.create(_defaults(Config)), given, str(path))
    return _build(Config, _resolve(merged, origins), origins)


def _read_file(path: Path) -> tuple[DictConfig, Origins]:
    try:
        text = path.read_text(encoding="utf-8")
        given = OmegaConf.create(text)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader), "")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path}: holds a {type(given).__name__}, needs keys such as 'algorithm:'")
    return given, {key: f"{path}:{line}" for key, line in lines.items()}


def _lines(node: Any, prefix: str) -> dict[str, int]:
    """Dotted key -> line, 1-based; keys that come through a YAML merge (``<<``) are left out."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            lines |= _lines(value, f"{name}.")
    return lines


def _parse_override(text: str) -> tuple[str, DictConfig]:
    key, equals, _ = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"command line: {text!r} is no override; write section.key=value, such as seed=2")
    try:
        value = OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: the value of {text!r} is not readable as YAML: {error}") from error
    _refuse_missing(value, "command line")
    return key, value


def _refuse_missing(given: DictConfig, source: str) -> None:
    # Merging takes omegaconf's "???" for "keep what is there", so a default would hide it.
    for key, value in _leaves(OmegaConf.to_container(given, resolve=False), ""):
        if value == "???":
            raise ConfigError(f"{source}: {key}: '???' asks for a value; give one with {key}=...")


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _leaves(below, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def _merge(base: DictConfig, over: DictConfig, what: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, over)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what}: does not fit over what it replaces: {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _resolve(merged: DictConfig, origins: Origins) -> Mapping[str, object]:
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{_where(key, origins)}{key}: {reason}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _defaults(section: type[Section]) -> dict[str, Any]:
    """The fields that have a default, so that ``${...}`` can name keys the file leaves out."""
    found: dict[str, Any] = {}
    for spec in fields(section):  # type: ignore[arg-type]
        below = section_of(hints(section)[spec.name])
        if spec.default is not MISSING:
            found[spec.name] = spec.default
        elif below is not None:
            found[spec.name] = _defaults(below)
    return found


def _where(key: str, origins: Origins) -> str:
    """``file:line: `` of a key, or of the section around it; "" when it was never written."""
    while key:
        if key in origins:
            return f"{origins[key]}: "
        key = key.rpartition(".")[0]
    return ""


def _build(section: type[AnySection], given: Mapping[str, object], origins: Origins) -> AnySection:
    known = hints(section)
    for name in given:
        if name not in known:
            where = _where(f"{section.key}.{name}".lstrip("."), origins)
            raise ConfigError(f"{where}{_unknown(section, str(name))}")
    for spec in fields(section):  # type: ignore[arg-type]
        if spec.default is MISSING and spec.default_factory is MISSING and spec.name not in given:
            key = f"{section.key}.{spec.name}".lstrip(".")
            raise ConfigError(f"{_where(key, origins)}{key}: missing, needs {describe(known[spec.name])}")
    return section(**{
        name: _convert(f"{section.key}.{name}".lstrip("."), value, known[name], origins)
        for name, value in given.items()
    })  # fmt: skip


def _convert(key: str, value: object, hint: Any, origins: Origins) -> object:
    below = section_of(hint)
    if below is not None and isinstance(value, Mapping):
        return _build(below, value, origins)
    if value is False and get_origin(hint) is Literal and "off" in get_args(hint):
        value = "off"  # which YAML reads as a bool
    try:
        check_value(key, value, hint)
    except ConfigError as error:
        raise ConfigError(f"{_where(key, origins)}{error}") from None
    if isinstance(value, list):
        return tuple(value)
    is_number = type(value) is int and not any(type(value) is _base(option) for option in alternatives(hint))
    return float(value) if is_number else value  # type: ignore[arg-type]


def _base(hint: Any) -> Any:
    """``int`` of ``Annotated[int, ...]``; other annotations as they are."""
    return getattr(hint, "__origin__", hint)


def _unknown(section: type[Section], name: str) -> str:
    """What to say of a key that ``section`` lacks: the closest key there, or where that key does stand."""
    siblings = list(hints(section))
    place = f"section '{section.key}'" if section.key else "the top level"
    close = difflib.get_close_matches(name, siblings, n=1)
    elsewhere = [f"{other.key}.{name}".lstrip(".") for other in sections(Config) if name in hints(other)]
    if close:
        hint = f"did you mean {f'{section.key}.{close[0]}'.lstrip('.')!r}?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(map(repr, elsewhere))}?"
    else:
        hint = f"its keys are {', '.join(siblings)}"
    return f"{place} has no key {name!r}; {hint}"
