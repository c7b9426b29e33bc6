"""From ``ModelConfig`` and a layout to Megatron's ``TransformerConfig``."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from mtrl.models.config import ModelConfig
from mtrl.models.stages import Stages
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import ConfigError
from mtrl.parallel.groups import ParallelGroups
from mtrl.parallel.spec import ParallelSpec

from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

Precision = Literal["fp32", "bf16", "fp64"]

_FUSIONS = ("gradient_accumulation_fusion", "bias_dropout_fusion", "masked_softmax_fusion")
_OWN_LOSSES = "Megatron's own count padding and depend on the layout; write actor.router instead"
_REFUSED = {
    "moe_expert_capacity_factor": "which tokens an expert then drops depends on which share a rank, and so "
    "the result on the layout; leave it out: no token is dropped",
    "moe_input_jitter_eps": "every rank would draw noise of its own, and the result depend on the layout",
    "moe_router_force_load_balancing": "experts would be chosen at random",
    "moe_router_load_balancing_type": _OWN_LOSSES,
    "moe_aux_loss_coeff": _OWN_LOSSES,
    "moe_z_loss_coeff": _OWN_LOSSES,
    "moe_router_bias_update_rate": _OWN_LOSSES,
}

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    # To tell a wrong sum from a rounded one; Megatron's optimizer keeps its masters in float32.
    "fp64": torch.float64,
}


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

    Raises:
        ConfigError: an override asks for what no layout but one process's could give, or counts padding.
    """
    _refuse(overrides)
    dtype = DTYPES[precision]
    fields: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "transformer_impl": "local",
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "qk_layernorm": config.qk_norm != "none" or config.mla is not None,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": config.linear_bias,
        "add_qkv_bias": config.qkv_bias,
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0),
        "bf16": precision == "bf16",
        **dict.fromkeys(("params_dtype", "pipeline_dtype"), dtype),
        # Every weight is read from a checkpoint or drawn by hf.py, the same for every layout.
        "perform_initialization": False,
        "use_cpu_initialization": current_device().kind == "cpu",
        **dict.fromkeys(_FUSIONS, False),
        "calculate_per_token_loss": True,
        **_layout_fields(groups.layout.spec),
        **_pipeline_fields(stages),
        **_moe_fields(config, precision),
        **_mla_fields(config),
    }
    kind = MLATransformerConfig if config.mla else TransformerConfig
    merged = {**fields, **overrides}
    if not config.linear_bias:
        return kind(**merged)
    # Megatron refuses expert biases with etp > 1, for its experts would add each one etp times; the backend's
    # own do not. So the field is set after the check.
    etp = merged.pop("expert_tensor_parallel_size")
    made = kind(**merged, expert_tensor_parallel_size=1)
    made.expert_tensor_parallel_size = etp
    return made


def recompute_fields(
    recompute: Literal["none", "full", "selective"], modules: Sequence[str]
) -> dict[str, Any]:
    """Megatron's fields for activations that are computed again in backward; see ``actor.recompute``."""
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    return {}


def _refuse(overrides: Mapping[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if overrides.get(name) not in (None, 0, False, "none"):
            raise ConfigError(f"{name}: given {overrides[name]}; {reason}")


def _layout_fields(spec: ParallelSpec) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": spec.attn.tp,
        "sequence_parallel": spec.attn.tp > 1,
        "context_parallel_size": spec.attn.cp,
        "pipeline_model_parallel_size": spec.attn.pp,
        "expert_model_parallel_size": spec.ffn.ep,
        "expert_tensor_parallel_size": spec.ffn.etp,
    }


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


def _moe_fields(config: ModelConfig, precision: Precision) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    fields: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_hidden_size,
        "moe_layer_freq": [int(layer in moe.moe_layers) for layer in range(config.num_layers)],
        # Softmax over the chosen experts is softmax over all, rescaled.
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_router_dtype": "fp64" if precision == "fp64" else "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_score_function": moe.score,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
        "moe_router_enable_expert_bias": moe.selection_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_shared_expert_intermediate_size": moe.shared_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_grouped_gemm": False,
    }
    if moe.num_groups > 1:
        fields |= {"moe_router_num_groups": moe.num_groups, "moe_router_group_topk": moe.top_groups}
    return fields


def _mla_fields(config: ModelConfig) -> dict[str, Any]:
    mla, scaling = config.mla, config.rope.scaling
    if mla is None:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.query_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rope_type": "yarn" if config.rope.kind == "yarn" else "rope",
        "rotary_base": config.rope.theta,
        # These two make the softmax scale; the frequencies are the backend's (rotary.py).
        "rotary_scaling_factor": float(scaling.get("factor", 1.0)),
        "mscale_all_dim": float(scaling.get("mscale_all_dim", 0.0)),
    }
