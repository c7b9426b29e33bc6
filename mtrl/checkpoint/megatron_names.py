"""Where Megatron's own checkpoints keep each role: keys of whole tensors, whatever layout wrote them.

Megatron writes one tensor in several ways: a layer's by itself or all layers' stacked, an expert's by itself
or all experts' stacked, gate and up in one or apart, norms under their own name or under the layer that
Transformer Engine fuses them into. All are brought to one form here: a tensor a layer, experts stacked, gate
before up, norms under their own name. Keys as of Megatron-Core 0.16.1 and 0.19.2.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mtrl.models.backends.torch_native.places import places as native_places
from mtrl.models.boxes import Box, Place
from mtrl.models.config import ModelConfig
from mtrl.models.roles import Role
from mtrl.models.weight_map import Places
from mtrl.parallel.errors import ModelError

LAYERS = "decoder.layers."
_LAYER = LAYERS + "{layer}."
_EXPERTS = _LAYER + "mlp.experts.experts."

# What a fused layer calls a norm, and its own name. The unfused form is read where both are there.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
_FUSED_NAME = {own: fused for fused, own in _FUSED_NORMS.items()}

_STACKED = re.compile(re.escape(LAYERS) + r"(?!\d+\.)(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<stem>.+\.experts\.experts)\.(?P<number>\d+)\.(?P<rest>.+)")
_HALF = re.compile(r"(?P<name>.+\.linear_fc1\.(weight|bias))_(?P<half>[wv])")
_OPTIMIZER = re.compile(r"optimizer\.|chained_\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """``box`` of the tensor ``name`` (in the one form) is ``inner`` of a stored chunk, dims of 1 aside."""

    name: str
    box: Box
    inner: Box


def places(config: ModelConfig) -> Places:
    """The place of every role in the one form.

    Raises:
        ModelError: Megatron-Core has no module, and so no key, for a part of this model.
    """
    if config.qk_norm == "all_heads":
        raise ModelError(
            f"{config.family}: queries and keys are normalised over all heads at once, and Megatron-Core's "
            "q_layernorm and k_layernorm (0.16.1 and 0.19.2) are of one head, so torch_dist has no key for "
            "these weights; use a Hugging Face folder or mtrl's own checkpoint"
        )
    own: dict[Role, Place] = {
        "expert.gate": _expert("linear_fc1.weight", "e (u j) h", ("u", 0, 2)),
        "expert.up": _expert("linear_fc1.weight", "e (u j) h", ("u", 1, 2)),
        "expert.gate_up": _expert("linear_fc1.weight", "e (c j) h"),
        "expert.gate_up_bias": _expert("linear_fc1.bias", "e (c j)"),
        "expert.down": _expert("linear_fc2.weight", "e h j"),
        "expert.down_bias": _expert("linear_fc2.bias", "e h"),
    }
    return {**native_places(config), **own}


def _expert(name: str, pattern: str, *within: tuple[str, int, int]) -> Place:
    return Place(name=_EXPERTS + name, pattern=pattern, within=within)


def is_of_model(key: str) -> bool:
    """Whether a stored tensor is a weight, not the optimizer's state."""
    return _OPTIMIZER.match(key) is None


def parts(key: str, shape: tuple[int, ...], chunk: Box) -> Iterator[Part]:
    """What ``chunk`` of the stored tensor ``key`` (of ``shape``) is in the one form."""
    stacked = _STACKED.fullmatch(key)
    if stacked is None:
        inner = chunk.relative_to(chunk)
        yield _one_form(key, shape, chunk, inner)
        return
    (start, stop), *rest = chunk.ranges
    for layer in range(start, stop):
        inner = Box(((layer - start, layer - start + 1), *((0, high - low) for low, high in rest)))
        name = f"{LAYERS}{layer}.{stacked['rest']}"
        yield _one_form(name, shape[1:], Box(tuple(rest)), inner)


def _one_form(name: str, shape: tuple[int, ...], box: Box, inner: Box) -> Part:
    half = _HALF.fullmatch(name)
    if half is not None:
        name, ((start, stop), *rest) = half["name"], box.ranges
        shift = shape[0] if half["half"] == "v" else 0
        box = Box(((start + shift, stop + shift), *rest))
    expert = _EXPERT.fullmatch(name)
    if expert is not None:
        number = int(expert["number"])
        name, box = f"{expert['stem']}.{expert['rest']}", Box(((number, number + 1), *box.ranges))
    return Part(name=_own_name(name), box=box, inner=inner)


def _own_name(name: str) -> str:
    layer, suffix = split_layer(name)
    return f"{LAYERS}{layer}.{_FUSED_NORMS[suffix]}" if suffix in _FUSED_NORMS else name


def split_layer(name: str) -> tuple[int | None, str]:
    """A layer's number and the rest of its tensor's name; None and the name for one of the whole model.

    >>> split_layer("decoder.layers.3.mlp.linear_fc2.weight")
    (3, 'mlp.linear_fc2.weight')
    """
    if not name.startswith(LAYERS):
        return None, name
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    return int(number), rest


def written_names(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The keys that Megatron's modules look for a tensor under.

    Its local modules and Transformer Engine's disagree on norms before a mixture and around latent attention,
    where there are two.
    """
    layer, suffix = split_layer(name)
    if layer is None or suffix not in _FUSED_NAME:
        return (name,)
    fused = f"{LAYERS}{layer}.{_FUSED_NAME[suffix]}"
    if config.mla is not None or (suffix.startswith("pre_mlp") and layer in config.moe_layers):
        return (name, fused)
    return (name,) if suffix.startswith("self_attention.") else (fused,)


def extra_state(config: ModelConfig, name: str) -> tuple[tuple[str, int], ...]:
    """Empty states that modules of the tensor ``name`` ask for, and how many there are of each (experts)."""
    if not name.endswith(".weight") or name.endswith(("router.weight", "embeddings.weight")):
        return ()
    if name.startswith("output_layer"):
        return ()
    module = name.removesuffix(".weight")
    found = [(module, config.extents()["e"] if ".experts.experts." in name else 0)]
    if module.endswith("self_attention.linear_proj"):
        found.append((module.replace("linear_proj", "core_attention"), 0))
    return tuple((f"{each}._extra_state", number) for each, number in found)
