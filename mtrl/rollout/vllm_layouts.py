"""In what order vLLM's kernels on GPUs keep weights that are loaded: noted for a push, or refused.

Experts on CPUs are noted as they are packed (``vllm_mends.py``). No kernel here has been run yet; vLLM's
conversions are torch, and run anywhere.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mtrl.parallel.errors import RolloutError
from mtrl.rollout.kernel_layout import KernelLayout, find_layout
from mtrl.rollout.vllm_mends import EXPERT_WEIGHTS

# Of these vLLM's conversion only moves elements, in the same way whatever the shape.
_REORDERING = ("TRITON", "BATCHED_TRITON", "FLASHINFER_CUTLASS")
_PROBED_SHAPE = (64, 32)


def note_expert_layouts(model: torch.nn.Module) -> None:
    """Write down on experts' weights in which order their kernels keep them, for `WeightLoader`.

    Raises:
        RolloutError: with the layer and its kernels, where a push does not know the order.
    """
    for name, layer in model.named_modules():
        method: Any = getattr(layer, "quant_method", None)
        if type(method).__name__ != "UnquantizedFusedMoEMethod" or method.unquantized_backend.name == "CPU":
            continue
        for which, weight in enumerate(EXPERT_WEIGHTS):
            live = getattr(layer, weight)
            layout = _converted(method.unquantized_backend, method.moe.is_act_and_mul, which)
            if layout is None:
                raise RolloutError(
                    f"vLLM computes {name} with {method.unquantized_backend.value}, which keeps {weight} in "
                    "an order that a push does not know; write rollout.moe_backend=triton"
                )
            if layout != KernelLayout():
                live.kernel_layout = layout


@cache
def _converted(backend: Any, is_gated: bool, which: int) -> KernelLayout | None:
    """Into which order vLLM converts the experts' first or second weight; None for what is more than that."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import convert_to_unquantized_kernel_format

    if backend.name not in _REORDERING:
        return None
    moe_config: Any = SimpleNamespace(is_act_and_mul=is_gated)
    other = torch.zeros(1, *_PROBED_SHAPE)

    def convert(matrix: Tensor) -> Tensor:
        pair = (other, matrix) if which else (matrix, other)
        converted: Tensor = convert_to_unquantized_kernel_format(backend, moe_config, *pair)[which]
        return converted

    return find_layout(convert, _PROBED_SHAPE, torch.float32)


def check_fp8_kernels(model: torch.nn.Module) -> None:
    """Check that vLLM took the kernels it was told to: others reorder weights or scales once they are loaded,
    and a push would write in the wrong order.

    Raises:
        RolloutError: with the layer and its kernel.
    """
    for name, layer in model.named_modules():
        method: Any = getattr(layer, "quant_method", None)
        if type(method).__name__ == "Fp8LinearMethod":
            kernel, wanted = type(method.fp8_linear).__name__, "TritonFp8BlockScaledMMKernel"
        elif type(method).__name__ == "Fp8MoEMethod":
            kernel, wanted = str(method.fp8_backend), "Fp8MoeBackend.TRITON"
        else:
            continue
        if kernel != wanted:
            raise RolloutError(
                f"vLLM computes {name} in FP8 with {kernel}; a push knows the layout of {wanted} alone, so "
                "write rollout.dtype=bf16"
            )
