"""The two values an allocation string stands for: `ParallelSpec` (training) and `RolloutSpec` (sampling).

Pure text and arithmetic: no torch, no ranks (layout.py), no model (the launch checks). Every rule that a
string can break raises a `SpecError` with a caret under the character that breaks it. The grammar is
spec_grammar.py's; `docs/spec.md` is the user's page.
"""

import math
from dataclasses import dataclass
from typing import Literal, NoReturn, cast, get_args

from mtrl.parallel.errors import SpecError
from mtrl.parallel.spec_grammar import MAX_SIZE, ROLLOUT_NAMES, ParsedText, Section, is_name, parse_text

TrainingBackend = Literal["megatron", "fsdp", "archon"]
RolloutBackend = Literal["vllm", "sglang"]
MAX_WORLD_SIZE = MAX_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class AttnAxes:
    """Sizes of the axes that attention (and everything else that is not an expert) is spread over."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks: dp * pp * tp * cp."""
        return self.dp * self.pp * self.tp * self.cp

    def __str__(self) -> str:
        return _axes_text(d=self.dp, p=self.pp, t=self.tp, c=self.cp)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnAxes:
    """Sizes of the axes that experts are spread over: attention's ranks, folded another way."""

    edp: int = 1
    pp: int = 1
    etp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Ranks: edp * pp * etp * ep."""
        return self.edp * self.pp * self.etp * self.ep

    def __str__(self) -> str:
        return _axes_text(d=self.edp, p=self.pp, t=self.etp, e=self.ep)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSpec:
    """How a training engine spreads over its ranks.

    ``str()`` is canonical: equal specs print the same string, and it parses back to the same value. It is a
    plain string where a plain string can say it (etp = 1), else a hybrid:

    >>> str(parse_spec("megatron:(attn:d4t2|ffn:e8)"))
    'megatron:d4t2e8'
    >>> str(parse_spec("megatron:(attn:d4t2|ffn:t2e4)"))
    'megatron:(attn:d4t2|ffn:t2e4)'
    """

    backend: TrainingBackend
    name: str | None = None
    attn: AttnAxes
    ffn: FfnAxes

    def __post_init__(self) -> None:
        attn, ffn = self.attn, self.ffn
        sizes = (attn.dp, attn.pp, attn.tp, attn.cp, ffn.edp, ffn.pp, ffn.etp, ffn.ep)
        _check_value(self, get_args(TrainingBackend), sizes)
        if ffn.pp != attn.pp:
            _refuse(self, f"attn has p{attn.pp} and ffn p{ffn.pp}, but they share their stages")
        if ffn.world_size != attn.world_size:
            _refuse(
                self, f"attn has {attn.world_size} ranks and ffn {ffn.world_size}, but they share their ranks"
            )
        if self.backend == "fsdp" and ffn.etp > 1:
            _refuse(self, "fsdp has no hybrid strings, so its etp is 1")

    @property
    def world_size(self) -> int:
        """Ranks: attention's dp * pp * tp * cp, which equals the experts' edp * pp * etp * ep."""
        return self.attn.world_size

    def __str__(self) -> str:
        attn, ffn = self.attn, self.ffn
        if ffn.etp > 1:
            return f"{_prefix(self)}(attn:{attn}|ffn:{ffn})"
        return _prefix(self) + _axes_text(d=attn.dp, p=attn.pp, t=attn.tp, c=attn.cp, e=ffn.ep)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """How a sampling engine spreads over its ranks: dp engines of pp * tp ranks each."""

    backend: RolloutBackend
    name: str | None = None
    dp: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        _check_value(self, get_args(RolloutBackend), (self.dp, self.tp, self.pp))

    @property
    def world_size(self) -> int:
        """Ranks: dp * pp * tp."""
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return _prefix(self) + _axes_text(d=self.dp, t=self.tp, p=self.pp)


def parse_spec(text: str) -> ParallelSpec | RolloutSpec:
    """Read one engine's allocation string; raises `SpecError` with a caret at the first thing wrong.

    >>> parse_spec("megatron:(attn:d2t2|ffn:e4)").ffn
    FfnAxes(edp=1, pp=1, etp=1, ep=4)
    >>> parse_spec("vllm:d2t4").world_size
    8
    """
    parsed = parse_text(text)
    axes = parsed.axes
    if parsed.backend in ROLLOUT_NAMES:
        _check_world(parsed, "dtp")
        backend = cast(RolloutBackend, parsed.backend)
        return RolloutSpec(
            backend=backend, name=parsed.name, dp=axes.size("d"), tp=axes.size("t"), pp=axes.size("p")
        )
    _check_world(parsed, "dptc")
    attn = AttnAxes(dp=axes.size("d"), pp=axes.size("p"), tp=axes.size("t"), cp=axes.size("c"))
    ffn = _fold_plain(parsed, attn) if parsed.ffn is None else _fold_hybrid(parsed, attn, parsed.ffn)
    return ParallelSpec(backend=cast(TrainingBackend, parsed.backend), name=parsed.name, attn=attn, ffn=ffn)


def parse_training_spec(text: str) -> ParallelSpec:
    """`parse_spec` where only a training engine makes sense (`actor.backend`, `ref.backend`)."""
    spec = parse_spec(text)
    if isinstance(spec, RolloutSpec):
        reason = f"{spec.backend} samples; a training engine is needed here, like megatron:d4"
        raise SpecError(reason, text, len(text) - len(text.lstrip()))
    return spec


def parse_rollout_spec(text: str) -> RolloutSpec:
    """`parse_spec` where only a sampling engine makes sense (`rollout.backend`)."""
    spec = parse_spec(text)
    if isinstance(spec, ParallelSpec):
        reason = f"{spec.backend} trains; a sampling engine is needed here, like vllm:d4"
        raise SpecError(reason, text, len(text) - len(text.lstrip()))
    return spec


def refuse_unsupported(spec: ParallelSpec | RolloutSpec) -> None:
    """Raise `SpecError` where the grammar knows the backend but mtrl does not run it, with what to write."""
    runs, verb = (
        ("vllm", "samples with vLLM")
        if isinstance(spec, RolloutSpec)
        else ("megatron", "trains with Megatron")
    )
    if spec.backend != runs:
        instead = str(spec).replace(spec.backend, runs, 1)
        _refuse(spec, f"mtrl {verb} and does not run {spec.backend}; write {instead}")


# ---- values ----


def _axes_text(**sizes: int) -> str:
    """Axes of size 1 left out: d4t2; d1 where nothing is left."""
    return "".join(f"{axis}{size}" for axis, size in sizes.items() if size != 1) or "d1"


def _prefix(spec: ParallelSpec | RolloutSpec) -> str:
    return f"{spec.backend}:" if spec.name is None else f"{spec.backend}[{spec.name}]:"


def _refuse(spec: ParallelSpec | RolloutSpec, reason: str) -> NoReturn:
    raise SpecError(reason, str(spec), 0)


def _check_value(spec: ParallelSpec | RolloutSpec, backends: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    """What a spec built by hand can have wrong, whatever its kind."""
    if spec.backend not in backends:
        _refuse(spec, f"unknown backend {spec.backend!r}; there are {', '.join(backends)}")
    if spec.name is not None and not is_name(spec.name):
        _refuse(spec, "a name is letters, digits and _, and does not start with a digit")
    if min(sizes) < 1:
        _refuse(spec, "every axis is at least 1")
    if spec.world_size > MAX_WORLD_SIZE:
        _refuse(spec, f"{spec.world_size} ranks; at most {MAX_WORLD_SIZE} are allowed")


# ---- rules between axes of a string ----


def _check_world(parsed: ParsedText, axes: str) -> None:
    world_size = math.prod(parsed.axes.size(axis) for axis in axes)
    if world_size > MAX_WORLD_SIZE:
        equation = f"{parsed.axes.product(axes)} = {world_size}"
        reason = f"{equation} ranks; at most {MAX_WORLD_SIZE} are allowed"
        raise SpecError(reason, parsed.text, parsed.axes.start)


def _fold_plain(parsed: ParsedText, attn: AttnAxes) -> FfnAxes:
    """R3, R4: etp is 1, edp is what p and e leave of the world."""
    pp, ep = attn.pp, parsed.axes.size("e")
    if attn.world_size % (pp * ep):
        need = f"p{pp}*e{ep} = {pp * ep}; nearest legal: {_nearest_legal(attn, 1, ep, 'd')}"
        _refuse_division(parsed, need, parsed.axes.column("e"))
    return FfnAxes(edp=attn.world_size // (pp * ep), pp=pp, ep=ep)


def _fold_hybrid(parsed: ParsedText, attn: AttnAxes, ffn: Section) -> FfnAxes:
    """R5, R6, R7: etp and ep as written, pp attention's, edp what they leave of the world."""
    pp, etp, ep = attn.pp, ffn.size("t"), ffn.size("e")
    if "p" in ffn.sizes and ffn.size("p") != pp:
        reason = f"attn has p{pp} and ffn p{ffn.size('p')}, but they share their stages; write p{pp} in ffn"
        raise SpecError(f"{reason} or leave it out", parsed.text, ffn.column("p"))
    divisor = pp * etp * ep
    if attn.world_size % divisor:
        legal = _nearest_legal(attn, etp, ep, "attn d")
        without_d = " (and leave ffn's d out)" if "d" in ffn.sizes else ""
        need = f"p{pp}*t{etp}*e{ep} = {divisor}; nearest legal: {legal}{without_d}"
        _refuse_division(parsed, need, ffn.column("e", "t"))
    edp = attn.world_size // divisor
    if "d" in ffn.sizes and ffn.size("d") != edp:
        ffn_world = f"d{ffn.size('d')}*p{pp}*t{etp}*e{ep} = {ffn.size('d') * divisor}"
        attn_world = f"{parsed.axes.product('dptc')} = {attn.world_size}"
        reason = f"attn has {attn_world} ranks and ffn {ffn_world}, but they share their ranks"
        raise SpecError(f"{reason}; write d{edp} in ffn or leave it out", parsed.text, ffn.column("d"))
    return FfnAxes(edp=edp, pp=pp, etp=etp, ep=ep)


def _refuse_division(parsed: ParsedText, need: str, column: int) -> NoReturn:
    axes = parsed.axes
    world_size = math.prod(axes.size(axis) for axis in "dptc")
    reason = f"the world {axes.product('dptc')} = {world_size} is not divisible by {need}"
    raise SpecError(reason, parsed.text, column)


def _nearest_legal(attn: AttnAxes, etp: int, ep: int, d_label: str) -> str:
    """The closest sizes of e, of ffn's t and of attention's d, changed one at a time, that divide."""
    stage_size = attn.dp * attn.tp * attn.cp
    options = []
    if stage_size % etp == 0:
        options.append(_around("e", ep, _divisors(stage_size // etp)))
    if etp > 1 and stage_size % ep == 0:
        options.append(_around("t", etp, _divisors(stage_size // ep)))
    step = etp * ep // math.gcd(etp * ep, attn.tp * attn.cp)
    below = attn.dp // step * step
    options.append(_around(d_label, attn.dp, [dp for dp in (below, below + step) if dp > 0]))
    return ", or ".join(options)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _around(label: str, wanted: int, sizes: list[int]) -> str:
    """The nearest of the ascending ``sizes`` below and above ``wanted``, as text."""
    below = [size for size in sizes if size < wanted][-1:]
    above = [size for size in sizes if size > wanted][:1]
    return " or ".join(f"{label}{size}" for size in below + above)
