"""Build this rank's pipeline chunks of a model: Megatron-Core's GPTModel with a backend's modules."""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mtrl.models.backends import Backend, unsupported
from mtrl.models.backends.torch_native import places as native_places
from mtrl.models.backends.torch_native import rotation
from mtrl.models.backends.torch_native.layers import layer_spec as native_layer_spec
from mtrl.models.backends.torch_native.norms import RMSNorm
from mtrl.models.backends.torch_native.rotary import PackedRotary, inverse_frequencies
from mtrl.models.carried import Carried
from mtrl.models.config import ModelConfig
from mtrl.models.fp8_parameters import Fp8Parameters
from mtrl.models.megatron_config import Precision, to_transformer_config
from mtrl.models.precision import Fp8
from mtrl.models.stages import Stages
from mtrl.models.weight_map import Places, WeightMap, check_model_fits, padded_vocab_size
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import ConfigError
from mtrl.parallel.groups import ParallelGroups

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

STATE_BUFFERS = ("router.expert_bias",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """This rank's part of a model.

    ``chunks`` are Megatron GPTModels in pipeline order: one, or as many as the virtual pipeline size.
    Their parameters are uninitialised until ``hf.load_weights`` fills them. ``weight_map`` says where
    every weight of every rank lives; ``carried`` is what a checkpoint holds and the model does not compute.
    """

    config: ModelConfig
    transformer_config: TransformerConfig
    groups: ParallelGroups
    chunks: tuple[nn.Module, ...]
    weight_map: WeightMap
    carried: Carried = field(default_factory=Carried)
    fp8_parameters: Fp8Parameters = field(default_factory=Fp8Parameters)

    def parameters(self) -> dict[tuple[int, str], nn.Parameter]:
        """This rank's parameters by (chunk, name)."""
        return {
            (number, name): parameter
            for number, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }

    def tensors(self) -> dict[tuple[int, str], torch.Tensor]:
        """Parameters, and the buffers that a checkpoint holds too (the experts' selection bias). Of those in
        FP8, copies: see `Fp8Parameters`.
        """
        buffers = {
            (number, name): buffer
            for number, chunk in enumerate(self.chunks)
            for name, buffer in chunk.named_buffers()
            if name.endswith(STATE_BUFFERS)
        }
        read = self.fp8_parameters.read
        return {key: read(parameter) for key, parameter in self.parameters().items()} | buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a backend gives: the spec of each (0-based) layer, the last norm, where its weights are, and its
    fields of Megatron's ``TransformerConfig``.
    """

    layer_spec: Callable[[ModelConfig, ParallelGroups, int], ModuleSpec]
    norm: type
    places: Places
    dense_places: Places = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


def build_model(
    config: ModelConfig,
    groups: ParallelGroups,
    *,
    precision: Precision = "fp32",
    fp8: Fp8 | None = None,
    backend: Backend = "torch_native",
    num_chunks: int = 1,
    **overrides: Any,
) -> Model:
    """Build this rank's chunks on this process's device.

    Args:
        config: the model.
        groups: the layout's process groups.
        precision: dtype of parameters and activations.
        fp8: how the layers' linears compute in FP8; None: in ``precision``.
        backend: which modules compute it.
        num_chunks: virtual pipeline size; 1 is a plain pipeline.
        overrides: fields of Megatron's ``TransformerConfig``.

    Raises:
        LayoutError: a size of the model is not divided by its axis.
        ConfigError: ``transformer_engine`` is not here, or cannot compute this model.
    """
    spec = groups.layout.spec
    check_model_fits(config, spec)
    parts = _parts(backend, config, precision, fp8)
    stages = Stages.balanced(config.num_layers, spec.attn.pp, num_chunks)
    transformer_config = to_transformer_config(
        config, groups, stages, precision=precision, **{**parts.fields, **overrides}
    )
    _, rotary_scale = inverse_frequencies(config.rope, config.head_dim)
    if rotary_scale != 1.0 and config.mla is None:
        # Megatron scales cosines and sines by 0.1 ln(f) + 1 of this attribute, which is no field of its
        # dataclass; this f gives the checkpoint's scale.
        transformer_config.yarn_rotary_scaling_factor = math.exp(10 * (rotary_scale - 1))
    chunks = tuple(
        _build_chunk(config, transformer_config, groups, stages, n, parts) for n in range(num_chunks)
    )
    weight_map = WeightMap(
        config=config, layout=groups.layout, stages=stages, places=parts.places,
        dense_places=parts.dense_places,
    )  # fmt: skip
    return Model(
        config=config,
        transformer_config=transformer_config,
        groups=groups,
        chunks=chunks,
        weight_map=weight_map,
    )


def _parts(backend: Backend, config: ModelConfig, precision: Precision, fp8: Fp8 | None) -> _Parts:
    if backend == "torch_native":
        return _Parts(
            layer_spec=functools.partial(native_layer_spec, fp8=fp8),
            norm=RMSNorm,
            places=native_places.places(config),
        )
    reason = unsupported(config, precision=precision, is_cuda=current_device().kind == "cuda")
    if importlib.util.find_spec("transformer_engine") is None:
        reason = "Transformer Engine is not installed"
    if reason:
        raise ConfigError(f"model.backend: transformer_engine: {reason}; write auto or torch_native")
    # Imports Transformer Engine, which few machines have.
    from mtrl.models.backends.transformer_engine import layers, places

    return _Parts(
        layer_spec=layers.layer_spec,
        norm=layers.NORM,
        places=places.places(config),
        dense_places=places.dense_places(),
        fields=layers.transformer_fields(config, fp8),
    )


def _build_chunk(
    config: ModelConfig,
    megatron: TransformerConfig,
    groups: ParallelGroups,
    stages: Stages,
    chunk: int,
    parts: _Parts,
) -> nn.Module:
    pp_rank = groups.coordinates.pp
    layers = stages.chunk_layers(pp_rank, chunk)
    model: nn.Module = GPTModel(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[parts.layer_spec(config, groups, layer) for layer in layers],
            layer_norm=parts.norm,
        ),
        vocab_size=padded_vocab_size(config.vocab_size, groups.layout.spec.attn.tp),
        max_sequence_length=config.max_position_embeddings,
        pre_process=stages.is_first(pp_rank, chunk),
        post_process=stages.is_last(pp_rank, chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope.theta,
        pg_collection=groups.collection,
        vp_stage=chunk if stages.num_chunks > 1 else None,
    )
    _replace_rotary(model, config, groups, on_cpu=megatron.use_cpu_initialization)
    rotation.install()
    return model.to(current_device().torch_device)


def _replace_rotary(model: nn.Module, config: ModelConfig, groups: ParallelGroups, *, on_cpu: bool) -> None:
    """Put the rotary embedding of packed segments where Megatron keeps its own: in the model, or, for latent
    attention, in each layer.
    """
    if config.mla is None:
        rotary = PackedRotary(config.rope, config.head_dim, cp_group=groups.attn.cp, on_cpu=on_cpu)
        model.rotary_pos_emb = rotary
        return
    rotary = PackedRotary(
        config.rope, config.mla.rope_dim, cp_group=groups.attn.cp, on_cpu=on_cpu,
        gives_scale=config.rope.kind == "yarn",
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            module.rotary_pos_emb = rotary
