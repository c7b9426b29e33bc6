"""Megatron's Adam: how it is asked for, and the torch optimizers that it is made of."""

from collections.abc import Iterator
from typing import Any

import torch

import mtrl.parallel.megatron_ready  # noqa: F401
from mtrl.config_engines import OptimizerSection

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

_BF16_MOMENTS: dict[str, Any] = {
    "use_precision_aware_optimizer": True,
    "exp_avg_dtype": torch.bfloat16,
    "exp_avg_sq_dtype": torch.bfloat16,
    # Says nothing of how the model computes: told of blocks, Megatron keeps the masters itself, in fp32,
    # where checkpoints know them, and gives FusedAdam the moments alone (OptimizerConfig.__post_init__).
    "fp8_recipe": "blockwise",
    "store_param_remainders": False,
}


def optimizer_config(settings: OptimizerSection, model: TransformerConfig, *, lr: float) -> OptimizerConfig:
    """Megatron's settings of a phase whose peak rate is ``lr``."""
    kinds: dict[str, Any] = {"fp8_recipe": "blockwise"} if model.fp8_param else {}
    made = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min(settings.min_lr, lr),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.grad_clip,
        bf16=model.bf16,
        params_dtype=model.params_dtype,
        use_distributed_optimizer=settings.distributed,
        optimizer_cpu_offload=settings.offload_fraction > 0,
        optimizer_offload_fraction=settings.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=True,
        **kinds | (_BF16_MOMENTS if settings.moments == "bf16" else {}),
    )
    if settings.offload_fraction > 0:
        # Else masters are made on the GPU, and the host's are copies of them. Given as a field, Megatron asks
        # for the version of Transformer Engine, with a TypeError where it is not installed.
        made.use_precision_aware_optimizer = True
        made.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    return made


def parts_of(optimizer: Any) -> Iterator[Any]:
    """Those of Megatron's optimizers, chained or one, that have parameters on this rank."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(each, "is_stub_optimizer", False):
            yield each


def adams_of(part: Any) -> list[Any]:
    """The torch optimizers of one of `parts_of`: one, or where some of them step on the host, several."""
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        return list(part.optimizer.sub_optimizers)
    return [part.optimizer]
