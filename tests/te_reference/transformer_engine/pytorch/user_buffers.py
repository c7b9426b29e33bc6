"""User buffers, in which tokens travel between tensor parallel ranks while a product runs.

Here nothing overlaps. As Transformer Engine's, they are made once, for one shape, on all ranks alike, and a
linear that was told to use them finds one of its name, and of exactly the shape that it needs.
"""

import enum
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NAMES = ("qkv", "proj", "fc1", "fc2")


class UserBufferQuantizationMode(enum.Enum):
    """What of a product travels: numbers as they are, or FP8."""

    NONE = "none"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    shape: tuple[int, int]
    tp_size: int
    modes: tuple[UserBufferQuantizationMode, ...]
    dtype: torch.dtype


_buffers: _Buffers | None = None
uses: dict[str, int] = {}
"""How often linears of each name took one; a test reads it."""


def initialize_ub(
    shape: list[int], tp_size: int, use_fp8: bool = False,
    quantization_modes: list[UserBufferQuantizationMode] | None = None, dtype: torch.dtype = torch.bfloat16,
    ub_cfgs: dict[str, Any] | list[dict[str, Any]] | None = None, bootstrap_backend: str | None = None,
) -> None:  # fmt: skip
    """Make them, of ``shape`` [tokens of all ranks, features]. Collective over WORLD."""
    global _buffers
    assert _buffers is None, "made once"
    assert quantization_modes and not use_fp8, "use_fp8 is the old way to say it"
    assert bootstrap_backend is not None and dist.is_backend_available(bootstrap_backend), bootstrap_backend
    world = dist.new_group(backend=bootstrap_backend)
    assert world.size() % tp_size == 0
    own = torch.tensor([*shape, tp_size])
    everyones = [torch.empty_like(own) for _ in range(world.size())]
    dist.all_gather(everyones, own, group=world)
    assert all(torch.equal(each, own) for each in everyones), everyones
    assert shape[0] % tp_size == 0, "every rank has its share of the tokens"
    _buffers = _Buffers(
        shape=(shape[0], shape[1]), tp_size=tp_size, modes=tuple(quantization_modes), dtype=dtype
    )


def destroy_ub() -> None:
    """Give them back."""
    global _buffers
    _buffers = None


def take(x: Tensor, name: str | None, *, tp_size: int, fp8: bool) -> None:
    """A linear's use of the buffers of ``name`` for ``x``, all ranks' tokens [..., features]."""
    assert name in _NAMES, f"{name} has no user buffer"
    assert _buffers is not None, "initialize_ub comes before the first product"
    mode = UserBufferQuantizationMode.FP8 if fp8 else UserBufferQuantizationMode.NONE
    assert mode in _buffers.modes, f"no buffer of {mode} for {name}"
    found = (x.numel() // x.shape[-1], x.shape[-1])
    if found != _buffers.shape or tp_size != _buffers.tp_size:
        raise RuntimeError(f"{name}: {found} over {tp_size} ranks, but the user buffers are {_buffers}")
    assert fp8 or x.dtype == _buffers.dtype, f"{name}: {x.dtype}, buffers of {_buffers.dtype}"
    uses[name] = uses.get(name, 0) + 1
