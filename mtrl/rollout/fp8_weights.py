"""Which weights an engine keeps in FP8, and what vLLM is told of it: DeepSeek-V3's format, 128 x 128 blocks.

A weight ``X`` is float8_e4m3fn and ``X_scale_inv`` float32, one number a block, and their product is the
weight. vLLM reads the same of checkpoints that are published in it. Pure.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mtrl.models.boxes import Box, parse_pattern
from mtrl.models.config import ModelConfig
from mtrl.models.families import Weight, family_named
from mtrl.models.hf_folder import SCALE_SUFFIX, SQUARE
from mtrl.models.roles import Role
from mtrl.parallel.errors import LayoutError, ModelError
from mtrl.parallel.spec import RolloutSpec

if TYPE_CHECKING:
    import torch

_ROLES: frozenset[Role] = frozenset((
    "attention.query", "attention.key", "attention.value", "attention.output",
    "mla.query", "mla.query_down", "mla.query_up", "mla.kv_down", "mla.kv_up", "mla.output",
    "mlp.gate", "mlp.up", "mlp.down", "expert.gate", "expert.up", "expert.down",
    "shared.gate", "shared.up", "shared.down",
))  # fmt: skip
"""The linears of layers. Embeddings, output layer and routers stay as they are, as in DeepSeek's folders."""

_WITHOUT = "rollout.dtype=bf16"


def fp8_names(config: ModelConfig) -> tuple[str, ...]:
    """The weights that are kept in FP8, in the table's order.

    Raises:
        ModelError: of this family's experts it is not known.
    """
    table = family_named(config.family).weights(config)
    if any(weight.role == "expert.gate_up" for weight in table):
        raise ModelError(
            f"rollout.dtype: fp8: the experts of {config.family} are fused in its checkpoints, and how vLLM "
            f"would take their scales is not known; write {_WITHOUT}"
        )
    return tuple(name for weight in table if weight.role in _ROLES for name in _names(weight, config))


def with_scales(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, those of the scales of ``names`` among them."""
    return {**shapes, **{name + SCALE_SUFFIX: SQUARE.grid(shapes[name]) for name in names}}


def fp8_dtypes(names: Iterable[str]) -> "dict[str, torch.dtype]":
    """Dtypes of FP8 weights, and of their scales."""
    import torch  # which the other rules do without: show_layout asks them

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
    """Check that no block reaches over two parts of a merged linear or two ranks' slices of any, and that
    every linear's input is whole blocks.

    vLLM 0.32 lets merged linears pass unchecked (``linear.py``, `_maybe_allow_fp8_block_shape_mismatch`):
    a part's scales then begin at the next whole block of the parameter and its weights before that, so that
    they are multiplied by a neighbour's scales. For experts it refines the blocks (``oracle/fp8.py``), which
    is not what is pushed. Linears that are not merged it refuses, inputs its kernel, once an engine starts.

    Raises:
        LayoutError: with the size, and what to write instead.
    """
    found = _cut_size(config, spec.tp, expert_parallel=expert_parallel)
    if found is None:
        return
    what, whole, ways = found
    share = f"{whole // ways} of the {whole}" if ways > 1 else f"all {whole}"
    instead = _uncut(config, spec, expert_parallel=expert_parallel)
    raise LayoutError(
        f"rollout.dtype: fp8: a scale is of {SQUARE.rows} x {SQUARE.columns} weights, and {spec} gives each "
        f"rank {share} {what}, no multiple of {SQUARE.rows}; write {instead}{_WITHOUT}"
    )


def _cut_size(config: ModelConfig, tp: int, *, expert_parallel: bool) -> tuple[str, int, int] | None:
    """The first size whose share is not whole blocks: what it counts, the size, among how many it is
    divided.
    """
    sizes = _divided_sizes(config, tp, expert_parallel=expert_parallel)
    return next((each for each in sizes if each[1] % (each[2] * SQUARE.rows)), None)


def _divided_sizes(config: ModelConfig, tp: int, *, expert_parallel: bool) -> Iterator[tuple[str, int, int]]:
    """Rows of the parts of linears, and inputs; gate and up, key and value are alike, and inputs of the last
    linear of attention or MLP are the first one's rows.
    """
    heads, moe, mla = config.num_attention_heads, config.moe, config.mla
    yield "dims of the hidden state", config.hidden_size, 1
    if mla is None:
        yield "dims of queries", heads * config.head_dim, tp
        # Where ranks outnumber KV heads, each has one.
        yield "dims of keys", config.num_kv_heads * config.head_dim, min(tp, config.num_kv_heads)
    else:
        # Merged with keys' and values' down-projection, whose rows come last and may end within a block.
        yield "dims of the query rank", mla.query_rank or 0, 1
        yield "dims of the key and value rank", mla.kv_rank, 1
        yield "dims of values", heads * mla.value_dim, tp
        if tp > 1:
            yield "dims of queries", heads * (mla.nope_dim + mla.rope_dim), tp
            yield "dims of keys and values", heads * (mla.nope_dim + mla.value_dim), tp
    if config.dense_layers:
        yield "dims inside an MLP", config.intermediate_size, tp
    if moe is not None:
        yield "dims inside the shared expert", moe.shared_hidden_size, tp
        yield "dims inside an expert", moe.expert_hidden_size, 1 if expert_parallel else tp


def _uncut(config: ModelConfig, spec: RolloutSpec, *, expert_parallel: bool) -> str:
    """What of `rollout` keeps blocks whole on as many ranks, as text before another choice, or ""."""
    can_spread = config.moe is not None and spec.tp > 1 and not expert_parallel
    if can_spread and _cut_size(config, spec.tp, expert_parallel=True) is None:
        return "rollout.expert_parallel=true, or "
    for tp in reversed(range(1, spec.tp)):
        if spec.tp % tp == 0 and _cut_size(config, tp, expert_parallel=expert_parallel) is None:
            return f"rollout.backend={replace(spec, dp=spec.dp * spec.tp // tp, tp=tp)}, or "
    return ""


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
