"""The grammar of the allocation string: text to sections of axes, each with the column it was written in.

    rollout   := ("vllm" | "sglang") [ "[" NAME "]" ] ":" ( [dtp] NUM )+
    training  := ("megatron" | "fsdp" | "archon") [ "[" NAME "]" ] ":" ( ( [dptce] NUM )+ | hybrid )
    hybrid    := "(" "attn" ":" ( [dptc] NUM )+ "|" "ffn" ":" ( [dpte] NUM )+ ")"  parentheses both or neither
    NUM       := [1-9][0-9]*        NAME := [A-Za-z_][A-Za-z0-9_]*        blanks between tokens are ignored

What the sizes mean, and which go together, is spec.py's.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from mtrl.parallel.errors import SpecError

TRAINING_NAMES = ("megatron", "fsdp", "archon")
ROLLOUT_NAMES = ("vllm", "sglang")
MAX_SIZE = 2**20  # of an axis and of a world: catches typing errors, and is far above any cluster

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIGITS = re.compile(r"[0-9]+")
_AXES_ONLY = re.compile(r"( *[dtpce] *[0-9]+)+ *")
_ADVICE = {
    ("ffn", "c"): "context parallelism folds into ffn's d",
    ("a rollout", "e"): "to spread experts over t, set rollout.expert_parallel: true",
    ("a rollout", "c"): "context parallelism is for training",
    ("a rollout", "("): "attn and ffn are for training",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One run of axes (``d4p2t2``) and where each was written."""

    start: int
    sizes: Mapping[str, int]
    columns: Mapping[str, int]

    def size(self, axis: str) -> int:
        """R1: an omitted axis is 1."""
        return self.sizes.get(axis, 1)

    def product(self, axes: str) -> str:
        """The sizes as an equation's left side, ``d4*p2*t2``."""
        return "*".join(f"{axis}{self.size(axis)}" for axis in axes)

    def column(self, *axes: str) -> int:
        """Where the first of these axes that was given stands; the section's start if none was."""
        return next((self.columns[axis] for axis in axes if axis in self.columns), self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedText:
    """A string that follows the grammar. A plain string has ``ffn`` None."""

    text: str
    backend: str
    name: str | None
    axes: Section
    ffn: Section | None


def is_name(text: str) -> bool:
    """Whether this may stand between the brackets of ``megatron[...]:``."""
    return _WORD.fullmatch(text) is not None


def parse_text(text: str) -> ParsedText:
    """Split the string into its parts; raises `SpecError` at the first character that breaks the grammar."""
    scanner = _Scanner(text)
    if "+" in text:
        _fail_whole_job(scanner, "+", text.index("+"))
    backend, name = _parse_engine(scanner)
    is_training, ffn = backend in TRAINING_NAMES, None
    if is_training and (scanner.at("(") or scanner.at("attn") or scanner.at("ffn")):
        if backend == "fsdp":
            scanner.fail("fsdp has no hybrid strings; write megatron instead, or plain axes")
        axes, ffn = _parse_hybrid(scanner)
    else:
        label, allowed = ("a training string", "dptce") if is_training else ("a rollout", "dtp")
        axes = _parse_axes(scanner, label, allowed)
        _refuse_bar(scanner)
    if scanner.column < len(scanner.text):
        scanner.fail(f"the spec is complete here, but {scanner.found} follows")
    return ParsedText(text=scanner.text, backend=backend, name=name, axes=axes, ffn=ffn)


class _Scanner:
    """A position in the string; blanks before every token are skipped."""

    def __init__(self, text: str) -> None:
        # Each blank as one space: the caret then stands right under tabs and line ends too.
        self.text = re.sub(r"[\t\r\n]", " ", text)
        self.column = 0
        self.take("")

    def fail(self, reason: str, column: int | None = None) -> NoReturn:
        at = self.column if column is None else column
        raise SpecError(reason, self.text, min(at, len(self.text.rstrip())))

    @property
    def found(self) -> str:
        """What stands here, for messages."""
        return repr(self.text[self.column]) if self.column < len(self.text) else "the end"

    def at(self, token: str) -> bool:
        return self.text.startswith(token, self.column)

    def take(self, token: str) -> bool:
        if not self.at(token):
            return False
        rest = self.text[self.column + len(token) :]
        self.column = len(self.text) - len(rest.lstrip(" "))
        return True

    def take_match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.column)
        token = match.group() if match else ""
        self.take(token)
        return token


def _parse_engine(scanner: _Scanner) -> tuple[str, str | None]:
    """``backend [ "[" NAME "]" ] ":"``."""
    start, name = scanner.column, None
    backend = scanner.take_match(_WORD)
    if backend not in TRAINING_NAMES + ROLLOUT_NAMES:
        _fail_backend(scanner, backend, start)
    if scanner.take("["):
        name = scanner.take_match(_WORD)
        if not name:
            scanner.fail(f"a name was expected after '[', letters, digits and _, but found {scanner.found}")
        if not scanner.take("]"):
            scanner.fail(f"']' was expected after the name, but found {scanner.found}")
    if not scanner.take(":"):
        scanner.fail(f"':' was expected after {backend}, but found {scanner.found}")
    return backend, name


def _parse_hybrid(scanner: _Scanner) -> tuple[Section, Section]:
    open_column = scanner.column
    is_open = scanner.take("(")
    if scanner.at("ffn"):
        scanner.fail("attn comes first, then ffn: attn:...|ffn:...")
    attn = _parse_labelled(scanner, "attn", "dptc")
    if not scanner.take("|"):
        scanner.fail("ffn is missing; a hybrid string is (attn:...|ffn:...), and a plain one has no attn")
    ffn = _parse_labelled(scanner, "ffn", "dpte")
    if is_open and not scanner.take(")"):
        scanner.fail("this '(' is never closed", open_column)
    if not is_open and scanner.at(")"):
        scanner.fail("this ')' was never opened")
    return attn, ffn


def _parse_labelled(scanner: _Scanner, label: str, allowed: str) -> Section:
    if not scanner.take(label):
        scanner.fail(f"'{label}:' was expected, but found {scanner.found}")
    if not scanner.take(":"):
        scanner.fail(f"':' was expected after {label}, but found {scanner.found}")
    return _parse_axes(scanner, label, allowed)


def _parse_axes(scanner: _Scanner, label: str, allowed: str) -> Section:
    """``( [allowed] NUM )+``, each axis once; ``label`` is what errors call it."""
    start, sizes, columns = scanner.column, dict[str, int](), dict[str, int]()
    while scanner.column < len(scanner.text) and not (scanner.at("|") or scanner.at(")")):
        axis, column = scanner.text[scanner.column], scanner.column
        if axis not in allowed:
            _fail_axis(scanner, label, allowed, axis)
        scanner.take(axis)
        size = _parse_size(scanner, axis)
        if axis in sizes:
            scanner.fail(f"{label} gives axis {axis!r} twice, {axis}{sizes[axis]} and {axis}{size}", column)
        sizes[axis], columns[axis] = size, column
    if not sizes:
        scanner.fail(f"{label} is empty; its axes are {', '.join(allowed)}, like {allowed[0]}1")
    return Section(start=start, sizes=sizes, columns=columns)


def _parse_size(scanner: _Scanner, axis: str) -> int:
    column = scanner.column
    digits = scanner.take_match(_DIGITS)
    if not digits:
        scanner.fail(f"axis {axis!r} needs a size, a whole number from 1, but found {scanner.found}")
    if digits.startswith("0"):
        number = digits.lstrip("0")
        advice = f"write {axis}{number}" if number else f"leave {axis} out or write {axis}1"
        scanner.fail(f"a size is a whole number from 1 without leading zeros; {advice}", column)
    if len(digits) > len(str(MAX_SIZE)) or int(digits) > MAX_SIZE:
        scanner.fail(f"axis {axis!r} is at most {MAX_SIZE}", column)
    return int(digits)


# ---- errors ----


def _fail_backend(scanner: _Scanner, word: str, start: int) -> NoReturn:
    text, known = scanner.text.strip(), TRAINING_NAMES + ROLLOUT_NAMES
    if not text:
        scanner.fail("the spec is empty; write a backend and its axes, like megatron:d4t2 or vllm:d4")
    if _AXES_ONLY.fullmatch(text) or text.startswith("(") or word in ("attn", "ffn"):
        rollout = f" (or vllm:{text} to sample)" if re.fullmatch(r"[dtp0-9 ]+", text) else ""
        scanner.fail(f"no backend; write megatron:{text}{rollout}", start)
    if not word:
        scanner.fail(f"a backend was expected ({', '.join(known)}), but found {scanner.found}")
    close = difflib.get_close_matches(word.lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    scanner.fail(f"unknown backend {word!r}; there are {', '.join(known)}{hint}", start)


def _fail_axis(scanner: _Scanner, label: str, allowed: str, axis: str) -> NoReturn:
    advice = _ADVICE.get((label, axis), "")
    if axis == "v":
        advice = "virtual stages are set by actor.virtual_pipeline_size"
    elif axis.isupper() and axis.lower() in allowed:
        advice = f"write {axis.lower()}"
    reason = f"{label} has no axis {axis!r}; its axes are {', '.join(allowed)}"
    scanner.fail(f"{reason}; {advice}" if advice else reason)


def _refuse_bar(scanner: _Scanner) -> None:
    """A ``|`` after plain axes is half a hybrid string, or AReaL's former way to let engines share ranks."""
    if scanner.at("|"):
        if scanner.text[scanner.column + 1 :].lstrip(" ").startswith("ffn"):
            scanner.fail("a plain string has no '|'; a hybrid one is (attn:...|ffn:...)")
        _fail_whole_job(scanner, "|", scanner.column)


def _fail_whole_job(scanner: _Scanner, joint: str, column: int) -> NoReturn:
    """R12: AReaL's former strings describe all engines of a job; name the fields that replace them."""
    left, right = (part.strip() for part in scanner.text.split(joint, 1))
    if not left.startswith(ROLLOUT_NAMES) and right.startswith(ROLLOUT_NAMES):
        left, right = right, left
    fields = f'rollout.backend: "{left}" and actor.backend: "{right}"'
    scanner.fail(f"one engine per string, {joint!r} joins two; use the per-engine fields {fields}", column)
