"""Which weights an engine keeps in FP8, and what vLLM is told of it: DeepSeek-V3's format, 128 x 128 blocks.

A weight ``X`` is float8_e4m3fn and ``X_scale_inv`` float32, one number a block, and their product is the
weight. vLLM reads the same of checkpoints that are published in it. Pure.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from mtrl.models.backends.torch_native.fp8 import SQUARE
from mtrl.models.boxes import Box, parse_pattern
from mtrl.models.config import ModelConfig
from mtrl.models.families import Weight, family_named
from mtrl.models.hf_folder import SCALE_SUFFIX
from mtrl.models.roles import Role
from mtrl.parallel.errors import LayoutError, ModelError
from mtrl.parallel.spec import RolloutSpec

_ROLES: frozenset[Role] = frozenset((
    "attention.query", "attention.key", "attention.value", "attention.output",
    "mla.query", "mla.query_down", "mla.query_up", "mla.kv_down", "mla.kv_up", "mla.output",
    "mlp.gate", "mlp.up", "mlp.down", "expert.gate", "expert.up", "expert.down",
    "shared.gate", "shared.up", "shared.down",
))  # fmt: skip
"""The linears of layers. Embeddings, output layer and routers stay as they are, as in DeepSeek's folders."""


def fp8_names(config: ModelConfig) -> tuple[str, ...]:
    """The weights that are kept in FP8, in the table's order.

    Raises:
        ModelError: of this family's experts it is not known.
    """
    table = family_named(config.family).weights(config)
    if any(weight.role == "expert.gate_up" for weight in table):
        raise ModelError(f"{config.family}: its experts' fused weights cannot be sampled with in FP8")
    return tuple(name for weight in table if weight.role in _ROLES for name in _names(weight, config))


def with_scales(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, those of the scales of ``names`` among them."""
    return {**shapes, **{name + SCALE_SUFFIX: SQUARE.grid(shapes[name]) for name in names}}


def fp8_dtypes(names: Iterable[str]) -> dict[str, torch.dtype]:
    """Dtypes of FP8 weights, and of their scales."""
    return {
        each: dtype
        for name in names
        for each, dtype in ((name, torch.float8_e4m3fn), (name + SCALE_SUFFIX, torch.float32))
    }


def quantization_config(config: ModelConfig) -> dict[str, Any]:
    """What stands in the ``config.json`` of a checkpoint in this format; errors as `fp8_names`."""
    quantised = set(fp8_names(config))
    matrices = [
        name.removesuffix(".weight")
        for weight in family_named(config.family).weights(config)
        if len(parse_pattern(weight.place.pattern)) > 1
        for name in _names(weight, config)
        if name not in quantised
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [SQUARE.rows, SQUARE.columns],
        "modules_to_not_convert": matrices,
    }


def check_sliced(config: ModelConfig, spec: RolloutSpec, *, expert_parallel: bool) -> None:
    """LayoutError where ``spec`` slices experts within blocks: vLLM then keeps finer blocks than are pushed.

    Of linears vLLM itself refuses it.
    """
    if config.moe is None or expert_parallel or spec.tp == 1:
        return
    share = config.moe.expert_hidden_size // spec.tp
    if share % SQUARE.columns:
        raise LayoutError(
            f"{spec}: FP8 blocks are {SQUARE.columns} wide, and t{spec.tp} leaves each rank {share} of the "
            f"{config.moe.expert_hidden_size} of an expert; use rollout.expert_parallel=true, or a smaller t"
        )


def block_box(box: Box) -> Box:
    """The blocks that a box of a matrix touches, as a box of its scales.

    >>> block_box(Box(((100, 256), (0, 40))))
    Box(ranges=((0, 2), (0, 1)))
    """
    sizes = (SQUARE.rows, SQUARE.columns)
    return Box(
        tuple(
            (low // size, math.ceil(high / size)) for (low, high), size in zip(box.ranges, sizes, strict=True)
        )
    )


def _names(weight: Weight, config: ModelConfig) -> Iterator[str]:
    experts = config.moe.num_experts if config.moe and "{expert}" in weight.place.name else 1
    for layer in weight.layers if weight.layers is not None else (0,):
        for expert in range(experts):
            yield weight.place.name.format(layer=layer, expert=expert)
