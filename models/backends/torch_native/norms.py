"""Root mean square norms (arXiv 1910.07467), right under tensor and sequence parallelism."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import mtrl.parallel.megatron_ready  # noqa: F401

from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(nn.Module):
    """Normalises over the last dim.

    Megatron's torch fall-back refuses sequence parallelism. All it takes is the mark on the weight:
    each tensor parallel rank sees its share of the tokens, so Megatron sums the gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` [..., hidden]; same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce: every rank's loss depends on every rank's summand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class AllHeadsRMSNorm(nn.Module):
    """Normalises queries (or keys) over the dims of all heads together, as OLMoE does.

    Each tensor parallel rank has its heads and all weights, of which it uses its heads': Megatron adds up the
    gradients of whatever is called ``q_layernorm`` or ``k_layernorm`` over ``tp_group``. The mean square is
    one all-reduce of a number a token. Legend: H this rank's heads, D head dim.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, num_heads: int,
        tp_group: dist.ProcessGroup, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.tp_group = eps, tp_group
        self.num_dims = num_heads * hidden_size
        self.weight = nn.Parameter(torch.ones(self.num_dims, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` [..., H, D]; same shape and dtype. Collective over ``tp_group``."""
        x_float = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = x_float.square().sum((-2, -1), keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.tp_group)  # type: ignore[no-untyped-call]
        normal = x_float * torch.rsqrt(squares / self.num_dims + self.eps)
        own_HD = self.weight.view(self.tp_group.size(), *x.shape[-2:])[self.tp_group.rank()]
        return own_HD * normal.to(x.dtype)
