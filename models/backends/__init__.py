"""Implementations of the transformer's parts, each with the places of its parameters by role; and which
models each can compute. Pure: imports neither torch nor Megatron.
"""

from typing import Literal

from mtrl.models.config import ModelConfig

Backend = Literal["torch_native", "transformer_engine"]


def unsupported(config: ModelConfig, *, precision: str, is_cuda: bool) -> str:
    """Why the ``transformer_engine`` backend cannot compute this model, or "".

    ``precision`` is that of weights and activations: ``"bf16"`` with FP8 too.
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
    return ""
