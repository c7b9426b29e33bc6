"""Queries and keys turned by their positions, in one compiled kernel on a GPU.

Megatron's own takes about ten kernels a call, and reads the segments' lengths back from the device, so that
the host cannot run ahead: twice a layer, and twice more where layers are recomputed.

Legend: T this rank's tokens, H heads, D head dim, R how many of its dims are turned.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import mtrl.parallel.megatron_ready  # noqa: F401
from mtrl.parallel.kernels import can_build_kernels

from megatron.core.models.common.embeddings import rope_utils

Kernel = Literal["torch.compile", "megatron"]
_USERS = ("attention", "multi_latent_attention")
"""Modules of megatron.core.transformer that hold ``apply_rotary_pos_emb`` by name."""


def rotation_kernel() -> Kernel:
    """What turns packed queries and keys in this process: `rotate` compiled, where kernels can be built; else
    Megatron's own operations, which give the same numbers but for the order of roundings.
    """
    return "torch.compile" if can_build_kernels() else "megatron"


def rotate(rows_THD: Tensor, angles_TR: Tensor, scale: float, *, is_paired: bool) -> Tensor:
    """Turn each token's first R dims by its angles; [T, H, D].

    ``angles_TR`` (float32) has each of the R / 2 angles twice, as Megatron's do; ``scale`` multiplies cosines
    and sines. Dim i is turned with dim i + R / 2; with ``is_paired``, which latent attention wants, 2 i with
    2 i + 1, and the result has the even ones first.
    """
    size = angles_TR.shape[-1] // 2
    turned_THR, rest = rows_THD[..., : 2 * size], rows_THD[..., 2 * size :]
    first, second = (
        (turned_THR[..., 0::2], turned_THR[..., 1::2]) if is_paired else turned_THR.chunk(2, dim=-1)
    )
    half_T1R = angles_TR[:, None, :size]
    cos, sin = ((each * scale).to(rows_THD.dtype) for each in (half_T1R.cos(), half_T1R.sin()))
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


@cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(rotate)
    return compiled


def apply(
    t: Tensor,
    freqs: Tensor,
    config: Any,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: dist.ProcessGroup | None = None,
    **more: Any,
) -> Tensor:
    """Megatron's ``apply_rotary_pos_emb``, for rows packed by `PackedSegments` without its reading back.

    All else (dense batches, pairs that stay where they are) is Megatron's own.
    """
    if cu_seqlens is None or config.rotary_interleaved or cp_group is None:
        return _megatrons(t, freqs, config, cu_seqlens, mscale=mscale, cp_group=cp_group, **more)
    # PackedSegments describes the row as one sequence, whose angles PackedRotary gives for all ranks.
    angles_TR = freqs.flatten(1)
    if cp_group.size() > 1:
        chunks = angles_TR.chunk(2 * cp_group.size())  # dealt in a zigzag: packed.py
        angles_TR = torch.cat((chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]))
    is_paired = more.get("mla_rotary_interleaved")
    for each in (t, angles_TR):
        torch._dynamo.maybe_mark_dynamic(each, 0)  # rows differ in length: one kernel for all
    return _compiled()(
        t, angles_TR, mscale, is_paired=config.multi_latent_attention if is_paired is None else is_paired
    )


_megatrons: Callable[..., Tensor] = rope_utils.apply_rotary_pos_emb


def install(kernel: Kernel | None = None) -> None:
    """Have Megatron's attention turn queries and keys by ``kernel``; None: `rotation_kernel`. Any number of
    times.
    """
    chosen = apply if (kernel or rotation_kernel()) == "torch.compile" else _megatrons
    for name in _USERS:
        user: Any = importlib.import_module(f"megatron.core.transformer.{name}")
        user.apply_rotary_pos_emb = chosen
