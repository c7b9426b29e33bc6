"""The scales of `fp8_delayed`, which Transformer Engine's modules keep between steps, as tensors.

What a module would have Megatron save of them (its extra state) is pickled, so it is left alone: scales are
read where they lie, and written there. They belong to a rank's own linears and, for experts, are joined over
ranks by position: under another layout they would be other tensors' scales.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mtrl.checkpoint.format import RunState, rank_file
from mtrl.models.builder import Model
from mtrl.models.safetensors_header import read_headers

from megatron.core.fp8_utils import get_fp8_context

KIND = "fp8"
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_PARTS = ("scale", "amax_history")


def scale_tensors(model: Model) -> dict[str, Tensor]:
    """By chunk, module, direction and part: the scales that this rank has, which share the modules' memory.
    None before the first step, and under recipes that compute scales as they go.
    """
    return {
        f"{name}|{direction}|{part}": getattr(module.fp8_meta[direction], part)
        for name, module in _modules(model)
        for direction in _DIRECTIONS
        for part in _PARTS
        if hasattr(module.fp8_meta.get(direction), part)
    }


def restore_scales(model: Model, checkpoint: Path, state: RunState) -> bool:
    """Put back this rank's scales, if the checkpoint has those of this layout; whether it did. Each rank
    by itself.
    """
    layout = model.groups.layout
    path = checkpoint / rank_file(KIND, model.groups.rank, layout.world_size)
    if (str(layout.spec), layout.world_size) != (state.spec, state.world_size) or not path.is_file():
        return False
    read_headers(path)
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _make_scales(model, {name.split("|")[0] for name in stored})
    own = scale_tensors(model)
    if {name: value.shape for name, value in own.items()} != {name: v.shape for name, v in stored.items()}:
        return False
    for name, value in stored.items():
        own[name].copy_(value)
    return True


def _make_scales(model: Model, names: set[str]) -> None:
    """Have the modules of these names make their scales now, not at their first step."""
    # Without gradients the end of the context renews no scales, which would be collective.
    with torch.no_grad(), get_fp8_context(model.transformer_config):
        for name, module in _modules(model):
            if name in names:
                module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))


def _modules(model: Model) -> Iterator[tuple[str, Any]]:
    for number, chunk in enumerate(model.chunks):
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta"):
                yield f"{number}.{name}", module
