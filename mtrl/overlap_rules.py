"""What a config asks to run at the same time: whether layout and model can give it, before launch.

Rules between keys, which hold on any machine.
"""

from mtrl.config import Config
from mtrl.config_check import RANKS_PER_NODE
from mtrl.model_settings import backend_of
from mtrl.models.config import ModelConfig
from mtrl.parallel.errors import ConfigError
from mtrl.parallel.spec import ParallelSpec

_UNIT = 4 * 8
"""Transformer Engine cuts the features of a reduce-scatter in 4 (``CommOverlapBase::split_overlap_rs``), and
its kernel moves 16 bytes at a time."""


def check_overlap(config: Config, actor: ParallelSpec, model: ModelConfig) -> None:
    """Raise ConfigError for an overlap that cannot be: the key, why, the fix."""
    _check_expert_communication(config, actor)
    _check_shared_experts(config, model)
    _check_user_buffers(config, actor, model)


def _check_expert_communication(config: Config, actor: ParallelSpec) -> None:
    """Megatron's own assertions (its transformer_config.py), and what its schedule of layers leaves out."""
    moe, key = config.actor.moe, "actor.moe.overlap_expert_communication"
    if not moe.overlap_expert_communication:
        return
    chunks, router = config.actor.virtual_pipeline_size or 1, config.actor.router
    reasons = {
        f"{actor} has experts on one rank; write e2 or more": actor.ffn.ep == 1,
        "with dispatcher allgather, which has nothing to overlap; write alltoall": moe.dispatcher
        == "allgather",
        "with model.precision fp32; write bf16": config.model.precision == "fp32",
        "with actor.recompute full; write none or selective": config.actor.recompute == "full",
        "with recompute_modules that hold moe; take it out": config.actor.recompute == "selective"
        and "moe" in config.actor.recompute_modules,
        "with losses or bias updates of actor.router, whose counts Megatron's schedule of layers does not "
        "carry; leave them out": (
            bool(router.aux_loss_coeff or router.z_loss_coeff or router.bias_update_rate)
        ),
        "with shared_expert_overlap; write one of both": moe.shared_expert_overlap,
        f"{actor} has pipeline stages of one chunk; write actor.virtual_pipeline_size=2 or more": (
            actor.attn.pp > 1 and chunks == 1
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{key}: true, but {reason}")


def _check_shared_experts(config: Config, model: ModelConfig) -> None:
    moe, key = config.actor.moe, "actor.moe.shared_expert_overlap"
    if not moe.shared_expert_overlap:
        return
    if not (model.moe and model.moe.shared_hidden_size):
        raise ConfigError(f"{key}: true, but this model has no shared experts; write false")
    if moe.dispatcher != "alltoall":
        raise ConfigError(f"{key}: true with dispatcher {moe.dispatcher}; it needs alltoall, or write false")
    if config.actor.recompute == "selective" and "shared_experts" in config.actor.recompute_modules:
        raise ConfigError(f"{key}: true with recompute_modules that hold shared_experts; take them out")


def _check_user_buffers(config: Config, actor: ParallelSpec, model: ModelConfig) -> None:
    if not config.actor.tp_comm_overlap:
        return
    tp, precision = actor.attn.tp, config.model.precision
    reasons = {
        "with torch_native, which has no such buffers; write model.backend=transformer_engine": (
            backend_of(config) != "transformer_engine"
        ),
        f"no tokens travel between tensor parallel ranks of {actor} with actor.sequence_parallel "
        f"{config.actor.sequence_parallel}; write t2 or more and auto": (
            tp == 1 or config.actor.sequence_parallel is False
        ),
        f"{actor} has {tp} tensor parallel ranks, which do not fit into nodes of {RANKS_PER_NODE}, and the "
        "buffers are memory that GPUs of one node share; write an attn.tp that divides it": (
            RANKS_PER_NODE % tp > 0
        ),
        f"{model.family} has latent attention, whose projections have no such buffers": model.mla is not None,
        "with model.precision fp8_blockwise, whose scales do not travel in them; write bf16 or fp8_delayed": (
            precision == "fp8_blockwise"
        ),
        "with actor.moe.overlap_expert_communication, which has two microbatches in the same buffers; write "
        "one of both": config.actor.moe.overlap_expert_communication,
        f"the model's hidden_size {model.hidden_size} is no multiple of {_UNIT}, by which products are cut": (
            model.hidden_size % _UNIT > 0
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            instead = ", or" if "; write " in reason else "; write"
            raise ConfigError(
                f"actor.tp_comm_overlap: true, but {reason}{instead} actor.tp_comm_overlap=false"
            )
