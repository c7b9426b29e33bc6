"""What a config section is made of: ranges, the check of one value, and the base of every section.

Leaves out files and overrides (``config_load.py``) and rules between keys (``config_check.py``).
"""

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from mtrl.parallel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers a field may hold: ``low <= x <= high``, or ``low < x`` when ``above`` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies in the range."""
        return value <= self.high and (value > self.low if self.above else value >= self.low)

    def __str__(self) -> str:
        lower = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return lower if math.isinf(self.high) else f"{lower} and at most {self.high:g}"


PositiveInt: TypeAlias = Annotated[int, Range(low=1)]
NonNegativeInt: TypeAlias = Annotated[int, Range(low=0)]
PositiveFloat: TypeAlias = Annotated[float, Range(low=0.0, above=True)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(low=0.0)]
Fraction: TypeAlias = Annotated[float, Range(low=0.0, high=1.0)]

_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


class Section:
    """Base of every config section; ``key`` is its dotted place in the file ("" for the whole)."""

    __slots__ = ()
    key: ClassVar[str]

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            check_value(f"{self.key}.{name}".lstrip("."), getattr(self, name), hint)


def hints(section: type[Any]) -> dict[str, Any]:
    """Field name -> its full annotation, in the order of declaration."""
    resolved = get_type_hints(section, include_extras=True)
    return {field.name: resolved[field.name] for field in fields(section)}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section_of(hint: Any) -> type[Section] | None:
    """The section class in an annotation such as ``WarmStartSection | None``; None for plain values."""
    for option in alternatives(hint):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def sections(section: type[Section]) -> Iterator[type[Section]]:
    """``section`` and every section below it, in the order of declaration."""
    yield section
    for hint in hints(section).values():
        below = section_of(hint)
        if below is not None:
            yield from sections(below)


def matches(value: object, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` allows. A bool is no integer; NaN is no number."""
    options = alternatives(hint)
    if len(options) > 1:
        return any(matches(value, option) for option in options)
    if get_origin(hint) is Annotated:
        base, bounds = get_args(hint)
        return matches(value, base) and bounds.contains(value)
    if get_origin(hint) is tuple:
        is_list = isinstance(value, list | tuple)
        return is_list and all(matches(each, get_args(hint)[0]) for each in value)  # type: ignore[attr-defined]
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    if hint in (int, bool):
        return type(value) is hint
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """What the annotation allows, in words: ``an integer, at least 1, or null``."""
    options = alternatives(hint)
    if len(options) > 1:
        return ", or ".join(describe(option) for option in options)
    if get_origin(hint) is Annotated:
        base, bounds = get_args(hint)
        return f"{describe(base)}, {bounds}"
    if get_origin(hint) is tuple:
        return f"a list of {describe(get_args(hint)[0])}"
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if hint is type(None):
        return "null"
    return _NAMES.get(hint, "a section of keys")


def check_value(key: str, value: object, hint: Any) -> None:
    """Raise ConfigError unless ``value`` fits ``hint``, with what was given and what is needed."""
    if not matches(value, hint):
        given = "null" if value is None else f"{value!r} ({type(value).__name__})"
        raise ConfigError(f"{key}: given {given}, needs {describe(hint)}")
