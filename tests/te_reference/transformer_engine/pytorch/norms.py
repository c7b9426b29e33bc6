"""Norms over the last dim, with the mark that Megatron reads under sequence parallelism."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Norm(nn.Module):
    def __init__(
        self, normalized_shape: int | None = None, eps: float = 1e-5, sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None, zero_centered_gamma: bool = False,
        hidden_size: int | None = None, device: object = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None), "one of the two names of the size"
        assert not zero_centered_gamma, "not in the reference"
        size = normalized_shape if hidden_size is None else hidden_size
        assert isinstance(size, int)
        self.eps, self.sequence_parallel = eps, sequence_parallel
        self.weight = nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))  # type: ignore[call-overload]
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(_Norm):
    """Root mean square norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(_Norm):
    """A name that Megatron's norm chooses from; mtrl's families have root mean square norms alone."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("not in the reference of Transformer Engine")
