"""Implementations of the transformer's parts, each with the places of its parameters by role; and the choice
between them. Pure: imports neither torch nor Megatron.
"""

from typing import Literal

from mtrl.models.config import ModelConfig
from mtrl.models.precision import Fp8
from mtrl.parallel.errors import ConfigError

Backend = Literal["torch_native", "transformer_engine"]
BackendChoice = Literal["auto", "torch_native", "transformer_engine"]

_NEEDS_GPU = "Transformer Engine's modules run on a GPU alone"


def choose_backend(
    asked: BackendChoice,
    config: ModelConfig,
    *,
    precision: str,
    fp8: Fp8 | None = None,
    missing: str,
    is_cuda: bool,
) -> Backend:
    """The backend that a run uses: ``auto`` is ``transformer_engine`` wherever it can compute the model.

    ``missing`` is why Transformer Engine cannot be used on this machine, or "".

    Raises:
        ConfigError: ``transformer_engine`` is asked for, and cannot be used here or for this model.
    """
    if asked == "torch_native":
        return asked
    here = missing or ("" if is_cuda else _NEEDS_GPU)
    reason = here or unsupported(config, precision=precision, fp8=fp8, is_cuda=is_cuda)
    if not reason:
        return "transformer_engine"
    if asked == "auto":
        return "torch_native"
    raise ConfigError(f"model.backend: transformer_engine: {reason}; write auto or torch_native")


def unsupported(config: ModelConfig, *, precision: str, fp8: Fp8 | None = None, is_cuda: bool) -> str:
    """Why the ``transformer_engine`` backend cannot compute this model, or "".

    ``precision`` is that of parameters and activations: ``"bf16"`` with FP8 too.
    """
    parts = {
        "attention sinks": config.sinks,
        "sliding windows": any(config.windows),
        "biases of experts and output projections": config.linear_bias,
        f"the activation {config.activation}": config.activation != "silu",
    }
    found = [part for part, has in parts.items() if has]
    if found:
        return f"{config.family} has {', '.join(found)}, which only torch_native computes"
    if precision == "fp64":
        return "precision fp64: it has no products of float64"
    if precision == "fp32" and is_cuda:
        return "precision fp32: its attention over packed samples is of bf16"
    if fp8 is not None and fp8.recipe == "fp8_delayed" and (fp8.bf16_first_layers or fp8.bf16_last_layers):
        return "fp8_delayed: Megatron-Core's delayed scaling leaves no first or last layers in bf16"
    return ""
