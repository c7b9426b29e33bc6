"""The communication of Transformer Engine's linears, each with the gradient that goes the other way.

With sequence parallelism ranks of the group hold shares of dim 0.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast, recomputing


class CudaRNGStatesTracker:
    """A name that Megatron subclasses at import; ranks here use Megatron's own tracker."""

    def reset(self) -> None:
        raise NotImplementedError("the reference of Transformer Engine tracks no generators")


def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> AbstractContextManager[None]:
    """Around a forward pass whose activations are dropped, and around the one that makes them again."""
    return recomputing(activation_recompute)


def checkpoint(
    function: Callable[..., Any], *args: Any, distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None, tp_group: Any = None,
) -> Any:  # fmt: skip
    """Call ``function`` now, and again in backward, which needs no activations kept, with FP8 as it is now.
    Not under delayed scaling, whose scales would be others by then.
    """
    assert not distribute_saved_activations, "not in the reference"
    is_on, recipe = FP8GlobalStateManager.is_fp8_enabled(), FP8GlobalStateManager.get_fp8_recipe()
    assert not (is_on and recipe.delayed()), "not in the reference"

    def recomputed(*tensors: Any) -> Any:
        with recomputing(True), fp8_autocast(enabled=is_on, fp8_recipe=recipe):
            return function(*tensors)

    return torch.utils.checkpoint.checkpoint(recomputed, *args, use_reentrant=True)


def _all_gather(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _all_reduce(x: Tensor, group: Any) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    return _all_reduce(x, group).chunk(group.size())[group.rank()].contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def into_columns(x: Tensor, group: Any, *, sequence_parallel: bool) -> Tensor:
    """What every rank of a column-parallel linear multiplies: the whole input."""
    apply: Any = (_Gather if sequence_parallel else _Copy).apply
    found: Tensor = apply(x, group)
    return found


def out_of_rows(x: Tensor, group: Any, *, sequence_parallel: bool) -> Tensor:
    """The sum of a row-parallel linear's products, of which each rank keeps its share of dim 0, or all."""
    apply: Any = (_ReduceScatter if sequence_parallel else _Reduce).apply
    found: Tensor = apply(x, group)
    return found
