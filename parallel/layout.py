"""Which ranks form which group: integers only, no processes.

A spec's axes are the digits of a rank, the fastest first: attention tp, cp, dp, pp; experts etp, ep, edp, pp
(Megatron-Core's order "tp-cp-ep-dp-pp"). Pipeline is the outermost axis on both sides, so a stage is the same
run of consecutive ranks for attention and for experts, whatever is folded inside it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal, Self

from mtrl.parallel.errors import LayoutError, SpecError
from mtrl.parallel.spec import ParallelSpec, RolloutSpec

AxisName = Literal["attn.tp", "attn.cp", "attn.pp", "attn.dp", "ffn.etp", "ffn.ep", "ffn.pp", "ffn.edp"]
RolloutAxisName = Literal["rollout.tp", "rollout.pp", "rollout.dp"]
ATTN_AXES: tuple[AxisName, ...] = ("attn.tp", "attn.cp", "attn.dp", "attn.pp")
FFN_AXES: tuple[AxisName, ...] = ("ffn.etp", "ffn.ep", "ffn.edp", "ffn.pp")
ROLLOUT_AXES: tuple[RolloutAxisName, ...] = ("rollout.tp", "rollout.pp", "rollout.dp")

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """Where one rank stands on every axis, each from 0; attention and experts share ``pp``."""

    dp: int
    pp: int
    tp: int
    cp: int
    edp: int
    etp: int
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """The ranks of a training engine.

    >>> from mtrl.parallel.spec import parse_training_spec
    >>> layout = RankLayout.from_spec(parse_training_spec("megatron:(attn:d2t2|ffn:e2)"))
    >>> layout.groups("attn.tp"), layout.groups("ffn.edp")
    (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    """

    spec: ParallelSpec

    @classmethod
    def from_spec(cls, spec: ParallelSpec) -> Self:
        """The only layout a spec has."""
        return cls(spec=spec)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.spec.world_size

    def size(self, axis: AxisName) -> int:
        """Ranks on one axis."""
        side, name = axis.split(".")
        size: int = getattr(self.spec.attn if side == "attn" else self.spec.ffn, name)
        return size

    def groups(self, axis: AxisName) -> Groups:
        """The groups of one axis: they partition the world. Ranks ascend, and groups by their first rank."""
        return self.product_groups(axis)

    def product_groups(self, *axes: AxisName) -> Groups:
        """Groups over several axes of one side at once.

        >>> from mtrl.parallel.spec import parse_training_spec
        >>> layout = RankLayout.from_spec(parse_training_spec("megatron:d2p2c2"))
        >>> layout.product_groups("attn.dp", "attn.cp")
        ((0, 1, 2, 3), (4, 5, 6, 7))
        """
        order = ATTN_AXES if axes[0] in ATTN_AXES else FFN_AXES
        if not set(axes) <= set(order):
            raise ValueError(f"a joint group lies on one side, attention or experts; got {', '.join(axes)}")
        return _groups(tuple(self.size(axis) for axis in order), tuple(axis in axes for axis in order))

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where this rank stands on every axis."""
        tp, cp, dp, pp = _digits(rank, [self.size(axis) for axis in ATTN_AXES])
        etp, ep, edp, _ = _digits(rank, [self.size(axis) for axis in FFN_AXES])
        return RankCoordinates(dp=dp, pp=pp, tp=tp, cp=cp, edp=edp, etp=etp, ep=ep)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLayout:
    """The ranks of a sampling engine: vLLM's order, tp fastest, then pp; each dp index is one engine."""

    spec: RolloutSpec

    @classmethod
    def from_spec(cls, spec: RolloutSpec) -> Self:
        """The only layout a spec has."""
        return cls(spec=spec)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.spec.world_size

    def size(self, axis: RolloutAxisName) -> int:
        """Ranks on one axis."""
        size: int = getattr(self.spec, axis.removeprefix("rollout."))
        return size

    def groups(self, axis: RolloutAxisName) -> Groups:
        """The groups of one axis, as in `RankLayout.groups`."""
        return self.product_groups(axis)

    def product_groups(self, *axes: RolloutAxisName) -> Groups:
        """Groups over several axes; ``("rollout.tp", "rollout.pp")`` gives the engines."""
        return _groups(
            tuple(self.size(axis) for axis in ROLLOUT_AXES), tuple(axis in axes for axis in ROLLOUT_AXES)
        )


def check_world_size(spec: ParallelSpec | RolloutSpec, world_size: int) -> None:
    """Raise `LayoutError` unless exactly as many processes were started as the spec has ranks."""
    if spec.world_size == world_size:
        return
    fitted = _fit_dp(spec, world_size)
    advice = f" or write {fitted}" if fitted is not None else ""
    raise LayoutError(
        f"{spec} needs {_equation(spec)} ranks, but torchrun started {world_size} "
        f"(WORLD_SIZE={world_size}); start it with {_torchrun_flags(spec.world_size)}{advice}"
    )


@lru_cache(maxsize=4096)
def _groups(sizes: tuple[int, ...], members: tuple[bool, ...]) -> Groups:
    """Ranks that differ only in the digits marked ``members``; ``sizes`` are the bases, fastest first."""
    strides = [math.prod(sizes[:place]) for place in range(len(sizes))]
    digits = list(zip(sizes, strides, members, strict=True))
    within = _sums((size, stride) for size, stride, member in digits if member)
    starts = _sums((size, stride) for size, stride, member in digits if not member)
    return tuple(tuple(start + offset for offset in within) for start in starts)


def _sums(digits: Iterable[tuple[int, int]]) -> list[int]:
    """All values of these (base, stride) digits, ascending when the fastest digit comes first."""
    slowest_first = [range(0, size * stride, stride) for size, stride in reversed(list(digits))]
    return [sum(parts) for parts in product(*slowest_first)]


def _digits(rank: int, sizes: list[int]) -> list[int]:
    if not 0 <= rank < math.prod(sizes):
        raise ValueError(f"rank {rank} is not in a world of {math.prod(sizes)}")
    digits = []
    for size in sizes:
        rank, digit = divmod(rank, size)
        digits.append(digit)
    return digits


def _equation(spec: ParallelSpec | RolloutSpec) -> str:
    if isinstance(spec, RolloutSpec):
        return f"d{spec.dp}*t{spec.tp}*p{spec.pp} = {spec.world_size}"
    attn = spec.attn
    return f"d{attn.dp}*p{attn.pp}*t{attn.tp}*c{attn.cp} = {spec.world_size}"


def _torchrun_flags(world_size: int) -> str:
    if world_size <= 8:
        return f"--nproc-per-node {world_size}"
    per_node = next(size for size in range(8, 0, -1) if world_size % size == 0)
    if per_node == 1:
        return f"--nnodes times --nproc-per-node = {world_size}"
    return f"--nnodes {world_size // per_node} --nproc-per-node {per_node}"


def _fit_dp(spec: ParallelSpec | RolloutSpec, world_size: int) -> ParallelSpec | RolloutSpec | None:
    """The same spec with another d that fits this world; None where no d does."""
    if isinstance(spec, RolloutSpec):
        dp, rest = divmod(world_size, spec.tp * spec.pp)
        return replace(spec, dp=dp) if dp and not rest else None
    dp, rest = divmod(world_size * spec.attn.dp, spec.world_size)
    edp, expert_rest = divmod(world_size * spec.ffn.edp, spec.world_size)
    if rest or expert_rest or not dp or not edp:
        return None
    try:
        return replace(spec, attn=replace(spec.attn, dp=dp), ffn=replace(spec.ffn, edp=edp))
    except SpecError:  # more ranks than any spec may have
        return None
