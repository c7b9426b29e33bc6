"""Build this rank's pipeline chunks of a model: Megatron-Core's GPTModel with a backend's modules."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mtrl.models.backends import torch_native
from mtrl.models.config import ModelConfig
from mtrl.models.megatron_config import Precision, to_transformer_config
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap, check_model_fits, padded_vocab_size
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.groups import ParallelGroups

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """This rank's part of a model.

    ``chunks`` are Megatron GPTModels in pipeline order: one, or as many as the virtual pipeline size.
    Their parameters are uninitialised until ``hf.load_weights`` fills them. ``weight_map`` says where
    every weight of every rank lives.
    """

    config: ModelConfig
    transformer_config: TransformerConfig
    groups: ParallelGroups
    chunks: tuple[nn.Module, ...]
    weight_map: WeightMap

    def parameters(self) -> dict[tuple[int, str], nn.Parameter]:
        """This rank's parameters by (chunk, name)."""
        return {
            (number, name): parameter
            for number, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }


def build_model(
    config: ModelConfig,
    groups: ParallelGroups,
    *,
    precision: Precision = "fp32",
    num_chunks: int = 1,
    **overrides: Any,
) -> Model:
    """Build this rank's chunks on this process's device.

    Args:
        config: the model.
        groups: the layout's process groups.
        precision: dtype of parameters and activations.
        num_chunks: virtual pipeline size; 1 is a plain pipeline.
        overrides: fields of Megatron's ``TransformerConfig``.

    Raises:
        LayoutError: a size of the model is not divided by its axis, or the spec has context parallelism.
    """
    spec = groups.layout.spec
    check_model_fits(config, spec)
    if spec.attn.cp > 1:
        raise LayoutError(
            f"{spec}: context parallelism (c{spec.attn.cp}) is not built yet; write it without c"
        )
    stages = Stages.balanced(config.num_layers, spec.attn.pp, num_chunks)
    transformer_config = to_transformer_config(config, groups, stages, precision=precision, **overrides)
    chunks = tuple(_build_chunk(config, transformer_config, groups, stages, n) for n in range(num_chunks))
    weight_map = WeightMap(
        config=config, layout=groups.layout, stages=stages, places=torch_native.places(config)
    )
    return Model(
        config=config,
        transformer_config=transformer_config,
        groups=groups,
        chunks=chunks,
        weight_map=weight_map,
    )


def _build_chunk(
    config: ModelConfig, megatron: TransformerConfig, groups: ParallelGroups, stages: Stages, chunk: int
) -> nn.Module:
    pp_rank = groups.coordinates.pp
    layers = stages.chunk_layers(pp_rank, chunk)
    model: nn.Module = GPTModel(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[_layer_spec(config, is_moe=layer in config.moe_layers) for layer in layers],
            layer_norm=torch_native.RMSNorm,
        ),
        vocab_size=padded_vocab_size(config.vocab_size, groups.layout.spec.attn.tp),
        max_sequence_length=config.max_position_embeddings,
        pre_process=stages.is_first(pp_rank, chunk),
        post_process=stages.is_last(pp_rank, chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        pg_collection=groups.collection,
        vp_stage=chunk if stages.num_chunks > 1 else None,
    )
    model.rotary_pos_emb = torch_native.PackedRotary(
        kv_channels=config.head_dim,
        rotary_percent=1.0,
        rotary_base=config.rope_theta,
        use_cpu_initialization=megatron.use_cpu_initialization,
        cp_group=groups.attn.cp,
    )
    _mark_sharded_weights(model)
    return model.to(current_device().torch_device)


def _mark_sharded_weights(model: nn.Module) -> None:
    """Mark weights that tensor parallel ranks hold distinct parts of.

    Megatron-Core 0.16 sets the mark only while initialising the weight (``tensor_parallel/layers.py``),
    which we leave out; unmarked weights would count once, not once a rank, in the gradient norm. 0.19
    sets it always, and then there is nothing to do here.
    """
    for module in model.modules():
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        weight = getattr(module, "weight", None)
        sharded = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if sharded and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _layer_spec(config: ModelConfig, *, is_moe: bool) -> ModuleSpec:
    backend = torch_native.TorchNativeProvider()
    norm = backend.layer_norm(rms_norm=True)
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=norm if config.qk_norm else IdentityOp,
        k_layernorm=norm if config.qk_norm else IdentityOp,
    )
    num_experts = config.moe.num_experts if is_moe and config.moe else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=num_experts),
            mlp_bda=get_bias_dropout_add,
        ),
    )
