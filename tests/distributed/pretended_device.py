"""A device for Megatron's optimizer that steps on the host: it asks tensors for ``is_cuda``, and where there
is no GPU all are on the host already.

Here it is told that every tensor is on a GPU but those that it moved to page-locked memory, and what it makes
of them. Only its questions are answered so, in this process; what it does with the answers is its own.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

_ASKS = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"


class OnHost(torch.Tensor):
    """What was moved to the host; what is made of one is one too."""


def pretend() -> None:
    """Answer so from here on; for a forked rank, which ends with its test."""
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(_is_on_device)
    tensor.pin_memory = _moving(tensor.pin_memory)


def _is_on_device(tensor: torch.Tensor) -> bool:
    return _asked() and not isinstance(tensor, OnHost)


def _moving(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def pin_memory(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        return tensor.as_subclass(OnHost) if _asked() else original(tensor, *args)

    return pin_memory


def _asked() -> bool:
    return bool(sys._getframe(2).f_globals.get("__name__") == _ASKS)
