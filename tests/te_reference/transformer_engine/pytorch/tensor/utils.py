"""What Megatron's distributed optimizer does with parameters in FP8."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.models.backends.torch_native.fp8 import E4M3, SQUARE, block_scales, spread
from transformer_engine.pytorch.tensor import Float8BlockwiseQTensor


def replace_raw_data(tensor: Float8BlockwiseQTensor, new_raw_data: Tensor) -> None:
    """Keep the numbers elsewhere."""
    assert new_raw_data.dtype == torch.uint8
    new_raw_data.copy_(tensor._rowwise_data)
    tensor._rowwise_data = new_raw_data


@torch.no_grad()
def cast_master_weights_to_fp8(
    model_weights: list[Float8BlockwiseQTensor], master_weights: list[Tensor | None],
    start_offsets: list[int | None], group: Any, *, manual_post_all_gather_processing: bool = False,
) -> None:  # fmt: skip
    """Write this rank's share of the masters into the FP8 numbers, each from ``start_offsets`` of its weight
    on; the other ranks' come by an all-gather. Blocks get their scales from all ranks of ``group``;
    collective over it. A master is rounded to the weight's nominal dtype first.
    """
    for weight, master, start in zip(model_weights, master_weights, start_offsets, strict=True):
        if hasattr(weight, "clear_high_precision_init_val"):
            weight.clear_high_precision_init_val()
        known = torch.zeros(weight.shape, dtype=weight.dtype)
        if master is not None:
            assert start is not None
            known.view(-1)[start : start + master.numel()] = master.to(weight.dtype)
        tops = _largest(known.float())
        dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
        scales = [block_scales(top.view(1, 1), SQUARE)[0, 0] for top in tops.flatten()]
        weight._rowwise_scale_inv.copy_(torch.stack(scales).view(tops.shape))
        if master is not None:
            numbers = (known.float() / spread(weight._rowwise_scale_inv, SQUARE, known.shape)).to(E4M3.dtype)
            part = slice(start, (start or 0) + master.numel())
            weight._rowwise_data.view(-1)[part] = numbers.view(torch.uint8).view(-1)[part]


def _largest(matrix: Tensor) -> Tensor:
    """The largest magnitude of each block."""
    tall, wide = SQUARE.grid((matrix.shape[0], matrix.shape[1]))
    rows = matrix.abs().split(SQUARE.rows)
    tops = [part.amax() for row in rows for part in row.split(SQUARE.columns, dim=1)]
    return torch.stack(tops).view(tall, wide)


def post_all_gather_processing(model_weights: Any) -> None:
    """Nothing: the transpose of a weight is never kept here."""
