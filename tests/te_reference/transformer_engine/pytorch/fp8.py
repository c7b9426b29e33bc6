"""Whether FP8 is on and with which recipe; and the scales of `DelayedScaling`, which live between passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, Recipe

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


class DelayedState:
    """Scales of a module's tensors in one direction: ``scale`` [n], ``amax_history`` [length, n], fp32. The
    history's first row collects what is seen until the next `update`.
    """

    def __init__(self, recipe: DelayedScaling, num_tensors: int, form: str) -> None:
        self.recipe, self.form = recipe, form
        self.scale = torch.ones(num_tensors)
        self.amax_history = torch.zeros(recipe.amax_history_len, num_tensors)

    def see(self, number: int, x: Tensor) -> None:
        if x.numel():
            seen = x.detach().abs().amax().float()
            self.amax_history[0, number] = torch.maximum(self.amax_history[0, number], seen)

    def update(self) -> None:
        """New scales; a tensor of zeros, or not seen, keeps its own."""
        history = self.amax_history
        largest = history[0] if self.recipe.amax_compute_algo == "most_recent" else history.amax(0)
        usable = (largest > 0) & largest.isfinite()
        found = LARGEST[self.form] / largest / 2**self.recipe.margin
        self.scale.copy_(torch.where(usable, found, self.scale))
        history.copy_(history.roll(-1, 0))
        history[0].zero_()


@dataclass
class _Global:
    enabled: bool = False
    recipe: Recipe | None = None
    group: Any = None
    depth: int = 0
    is_first: bool = False
    creates_quantised: bool = False
    creates_with: Recipe | None = None
    keeps_initial: bool = False
    is_recomputed: bool = False
    seen: dict[str, dict[int, DelayedState]] = field(default_factory=lambda: {"forward": {}, "backward": {}})


_NOW = _Global()


class FP8GlobalStateManager:
    """What is on now."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return _NOW.enabled

    @staticmethod
    def is_fp8_calibration() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> Recipe:
        return _NOW.recipe if _NOW.recipe is not None else DelayedScaling()

    @staticmethod
    def get_fp8_group() -> Any:
        return _NOW.group

    @staticmethod
    def is_first_fp8_module() -> bool:
        """Whether none asked since FP8 came on: the first forwards is the last backwards."""
        was_first, _NOW.is_first = _NOW.is_first, False
        return was_first

    @staticmethod
    def with_fp8_parameters() -> bool:
        return _NOW.creates_quantised


def created_quantised() -> tuple[Recipe, bool] | None:
    """Of weights that are made now: their recipe and whether what they began as is kept; None: plain ones."""
    if not _NOW.creates_quantised:
        return None
    return _NOW.creates_with or DelayedScaling(), _NOW.keeps_initial


@contextmanager
def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None, fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Linears inside compute with ``fp8_recipe``. When the outermost ends, forward scales are renewed, with
    the largest magnitudes of all ranks of ``fp8_group``; collective over it under `DelayedScaling`.
    """
    assert not calibrating and not _graph, "not in the reference"
    before = (_NOW.enabled, _NOW.recipe, _NOW.group)
    if _NOW.depth == 0 and enabled:
        _NOW.is_first = True
    _NOW.depth += 1
    _NOW.enabled, _NOW.recipe, _NOW.group = enabled, fp8_recipe, fp8_group
    try:
        yield
    finally:
        _NOW.depth -= 1
        _NOW.enabled, _NOW.recipe, _NOW.group = before
    if enabled and _NOW.depth == 0 and torch.is_grad_enabled():
        update_delayed("forward", fp8_group)


def make_states(meta: dict[str, Any], num_gemms: int) -> None:
    """A module's scales: of its inputs, weights and outputs, and of the gradients of outputs and inputs."""
    recipe = meta["recipe"]
    if "scaling_fwd" not in meta:
        meta["scaling_fwd"] = DelayedState(recipe, 3 * num_gemms, "e4m3")
        meta["scaling_bwd"] = DelayedState(recipe, 2 * num_gemms, recipe.fp8_format.gradients)


def noted(state: DelayedState, direction: str) -> DelayedState:
    """``state``, to be renewed at the next update."""
    return _NOW.seen[direction].setdefault(id(state), state)


def update_delayed(direction: str, group: Any) -> None:
    """Renew the scales of every module that was seen, with the largest magnitudes of the group's ranks."""
    states = list(_NOW.seen[direction].values())
    if not states:
        return
    if states[0].recipe.reduce_amax and group is not None and group.size() > 1:
        largest = torch.cat([state.amax_history[0] for state in states])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        parts = largest.split([state.scale.numel() for state in states])
        for state, part in zip(states, parts, strict=True):
            state.amax_history[0] = part
    for state in states:
        state.update()


@contextmanager
def recomputing(is_on: bool) -> Iterator[None]:
    """Around a forward pass that is made again in backward, or will be."""
    before, _NOW.is_recomputed = _NOW.is_recomputed, is_on
    try:
        yield
    finally:
        _NOW.is_recomputed = before


def check_not_recomputed() -> None:
    assert not _NOW.is_recomputed, "the reference keeps no scales of delayed scaling for a recomputed pass"


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Weights of linears made inside are kept in FP8."""
    before = (_NOW.creates_quantised, _NOW.creates_with, _NOW.keeps_initial)
    _NOW.creates_quantised, _NOW.creates_with = enabled, recipe
    _NOW.keeps_initial = preserve_high_precision_init_val
    try:
        yield
    finally:
        _NOW.creates_quantised, _NOW.creates_with, _NOW.keeps_initial = before
