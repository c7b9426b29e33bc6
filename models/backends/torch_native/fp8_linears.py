"""Megatron's parallel linears with their products in FP8 blocks (fp8.py); communication stays Megatron's."""

from typing import Any, ClassVar

import torch

import mtrl.parallel.megatron_ready  # noqa: F401
from mtrl.models.backends.torch_native.fp8 import block_linear
from mtrl.models.precision import Fp8

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class _InBlocks:
    """What Megatron's linears call for their product, in FP8."""

    fp8: ClassVar[Fp8]

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **unused: Any,
    ) -> torch.Tensor:
        """This rank's ``input`` [tokens, batch, K] to [.., O]; under sequence parallelism all ranks'."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = block_linear(input, weight, self.fp8)
        return output if bias is None else output + bias


class BlockColumnParallelLinear(_InBlocks, ColumnParallelLinear):  # type: ignore[misc]
    """Output features over ``attn.tp``."""


class BlockRowParallelLinear(_InBlocks, RowParallelLinear):  # type: ignore[misc]
    """Input features over ``attn.tp``: the sum over ranks is of bf16 or fp32 parts, as without FP8."""


def with_fp8(kind: type, fp8: Fp8) -> type:
    """``kind`` with its way of FP8; still a class, since Megatron 0.16 builds classes only."""
    return type(kind.__name__, (kind,), {"fp8": fp8})
