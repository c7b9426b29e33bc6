"""Log-probabilities of target tokens from logits whose vocabulary is over tensor parallel ranks.

No copy of the logits in float32 lives for long: rows are worked on a few at a time, and again for the
gradient. On a GPU a kernel of flash-linear-attention does the same where it is installed; `logprob_kernel`
says which it is.

Legend: T this rank's tokens of a microbatch, V this rank's share of the vocabulary, N some of the tokens.
"""

import importlib
import math
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.kernels import can_build_kernels

ROWS_BYTES = {"cpu": 2**22, "cuda": 2**26}
"""What a copy of some rows takes at most: what a core's cache holds (measured: a third of the time that all
rows at once take), and on a GPU work enough for a kernel, little beside 16,384 tokens' logits (5 GB).
"""
Kernel = Literal["fla.modules.fused_cross_entropy", "mtrl.logprobs"]
FLA_TESTED = "0.6."
"""Versions of fla-core that tests/distributed/test_logprobs.py has run: those that begin so."""
_MASKED = -1e30  # finite when divided by a temperature, and exp() of it is 0 all the same


@cache
def logprob_kernel() -> Kernel:
    """What computes log-probabilities in this process: the kernel of fla-core on a GPU, where its version is
    one that was tested and kernels can be built; else this file. Logits in float64 are always this file's.
    """
    if not can_build_kernels():
        return "mtrl.logprobs"
    try:
        found = version("fla-core")
    except PackageNotFoundError:
        return "mtrl.logprobs"
    return "fla.modules.fused_cross_entropy" if found.startswith(FLA_TESTED) else "mtrl.logprobs"


def target_logprobs(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    padding: int,
    temperature: float,
    group: dist.ProcessGroup,
    kernel: Kernel | None = None,
) -> Tensor:
    """Natural log-probability of each target at a temperature, float32 [T]; carries a gradient.

    ``logits_TV`` is this rank's share of the vocabulary, whose last ``padding`` columns are not tokens. It is
    not to be used afterwards: its memory may hold the gradient. Targets count through all shares. Collective
    over ``group``, which is ``attn.tp``. Logits of a float64 model stay float64. ``kernel`` None means
    `logprob_kernel`.
    """
    if (kernel or logprob_kernel()) == "mtrl.logprobs" or logits_TV.dtype == torch.float64:
        logprobs_T: Tensor = _InParts.apply(logits_TV, targets_T, padding, temperature, group)  # type: ignore[no-untyped-call]
        return logprobs_T
    return _by_fla(logits_TV, targets_T, padding, temperature, group)


def _by_fla(
    logits_TV: Tensor, targets_T: Tensor, padding: int, temperature: float, group: dist.ProcessGroup
) -> Tensor:
    fla: Any = importlib.import_module("fla.modules.fused_cross_entropy")
    if padding:
        # In place and unseen by autograd: no copy, and the gradient of these columns is 0 anyway.
        logits_TV.detach()[:, logits_TV.shape[-1] - padding :] = _MASKED
    nll_T: Tensor = fla.cross_entropy_loss(
        logits_TV, targets_T, logit_scale=1.0 / temperature, inplace_backward=True,
        process_group=group if group.size() > 1 else None,
    )[0]  # fmt: skip
    return -nll_T


class _InParts(torch.autograd.Function):
    """Megatron's arithmetic of a cross-entropy over a split vocabulary, in its order, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets_T: Tensor,
        padding: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        share = logits_TV.shape[-1]
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        own_T = targets_T - share * group.rank()
        is_other_T = (own_T < 0) | (own_T >= share)
        own_T = own_T.masked_fill(is_other_T, 0)
        ctx.padding, ctx.temperature, ctx.parts = padding, temperature, _parts(logits_TV, dtype)
        highest_T = _highest(logits_TV, padding, temperature, dtype)
        _all_reduce(highest_T, dist.ReduceOp.MAX, group)
        chosen_T, total_T = torch.empty_like(highest_T), torch.empty_like(highest_T)
        for part in ctx.parts:
            shifted_NV = _shifted(logits_TV[part], highest_T[part], padding, temperature)
            chosen_T[part] = shifted_NV.gather(1, own_T[part, None]).squeeze(1)
            total_T[part] = shifted_NV.exp_().sum(-1)
        chosen_T.masked_fill_(is_other_T, 0.0)
        _all_reduce(chosen_T, dist.ReduceOp.SUM, group)
        _all_reduce(total_T, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(logits_TV, highest_T, total_T, own_T, is_other_T)
        return chosen_T - total_T.log()

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_TV, highest_T, total_T, own_T, is_other_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        hit_T = (~is_other_T).to(total_T.dtype)
        for part in ctx.parts:
            grad_NV = _shifted(logits_TV[part], highest_T[part], ctx.padding, ctx.temperature).exp_()
            grad_NV.div_(total_T[part, None])
            grad_NV.scatter_add_(1, own_T[part, None], -hit_T[part, None])
            grad_NV.mul_(-grad_T[part, None])
            if ctx.padding:
                grad_NV[:, grad_NV.shape[1] - ctx.padding :] = 0.0
            if ctx.temperature != 1.0:
                grad_NV.div_(ctx.temperature)
            grad_TV[part] = grad_NV
        return grad_TV, None, None, None, None


def _parts(logits_TV: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of the rows, each of about ``ROWS_BYTES`` in ``dtype``.

    Never a single row of many: threads share the sum of one row otherwise, and the last bit could differ.
    """
    (num_rows, share), most = logits_TV.shape, ROWS_BYTES[logits_TV.device.type]
    num_parts = min(math.ceil(num_rows * share * dtype.itemsize / most), num_rows // 2)
    bounds = [num_rows * n // max(1, num_parts) for n in range(max(1, num_parts) + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _highest(logits_TV: Tensor, padding: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """Of each row, at the temperature; the dtype's least number where all columns are padding."""
    real_TV = logits_TV[:, : logits_TV.shape[-1] - padding]
    if not real_TV.shape[-1]:
        return logits_TV.new_full(logits_TV.shape[:1], torch.finfo(dtype).min, dtype=dtype)
    # Rounding keeps order: the highest of the logits is also the highest of what they become.
    return real_TV.amax(-1).to(dtype) / temperature


def _shifted(logits_NV: Tensor, highest_N: Tensor, padding: int, temperature: float) -> Tensor:
    """A new tensor, in the dtype of ``highest_N``: logits at the temperature less the row's highest."""
    if temperature == 1.0:
        shifted_NV = logits_NV - highest_N[:, None]
    else:
        shifted_NV = (logits_NV.to(highest_N.dtype) / temperature).sub_(highest_N[:, None])
    if padding:
        shifted_NV[:, shifted_NV.shape[1] - padding :] = -math.inf
    return shifted_NV


def _all_reduce(values_T: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(values_T, op=operation, group=group)
