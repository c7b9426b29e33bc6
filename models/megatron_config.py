"""From ``ModelConfig`` and a layout to Megatron's ``TransformerConfig``."""

from typing import Any, Literal

import torch
import torch.nn.functional as F

from mtrl.models.config import ModelConfig
from mtrl.models.stages import Stages
from mtrl.parallel.device import current_device
from mtrl.parallel.groups import ParallelGroups

from megatron.core.transformer.transformer_config import TransformerConfig

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def to_transformer_config(
    config: ModelConfig,
    groups: ParallelGroups,
    stages: Stages,
    *,
    precision: Precision = "fp32",
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's description of this model under this layout.

    Sequence parallelism is on whenever ``attn.tp`` > 1: Megatron's MoE layers need it to train, and
    it only saves memory elsewhere. Losses are sums, divided once by the global count of tokens
    (``calculate_per_token_loss``). ``overrides`` are fields of ``TransformerConfig`` and win.
    """
    spec = groups.layout.spec
    dtype = DTYPES[precision]
    fields: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "qk_layernorm": config.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": precision == "bf16",
        "pipeline_dtype": dtype,
        # Every weight is read from a checkpoint or drawn by hf.py, the same for every layout.
        "perform_initialization": False,
        "use_cpu_initialization": current_device().kind == "cpu",
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": spec.attn.tp,
        "sequence_parallel": spec.attn.tp > 1,
        "context_parallel_size": spec.attn.cp,
        "pipeline_model_parallel_size": spec.attn.pp,
        "expert_model_parallel_size": spec.ffn.ep,
        "expert_tensor_parallel_size": spec.ffn.etp,
        **_pipeline_fields(stages),
        **_moe_fields(config),
    }
    return TransformerConfig(**{**fields, **overrides})


def _pipeline_fields(stages: Stages) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if stages.num_chunks > 1:
        fields["virtual_pipeline_model_parallel_size"] = stages.num_chunks
        # Batched sends between the same two ranks cross on gloo, and freeing outputs early frees
        # what gloo still sends (FAMILIES.md has the measurements); neither is known on NCCL.
        fields["overlap_p2p_comm"], fields["batch_p2p_comm"] = True, False
        fields["deallocate_pipeline_outputs"] = current_device().kind == "cuda"
    if not stages.is_even:
        names = [["decoder"] * len(layers) for layers in stages.layers]
        names[0].insert(0, "embedding")
        names[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = names
    return fields


def _moe_fields(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_hidden_size,
        "moe_layer_freq": [int(layer in moe.moe_layers) for layer in range(config.num_layers)],
        # Softmax over the chosen experts is softmax over all, rescaled.
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
