"""What a config asks of accelerators: whether layout, model and this machine can give it, before launch.

Rules between keys come first, since they hold on any machine; then the one place that knows what is installed
and works here (`mtrl.parallel.capabilities`), asked once and only for what goes beyond plain torch.
"""

from collections.abc import Callable, Iterator
from functools import cache

from mtrl.config import Config
from mtrl.config_acceleration import MoeSection
from mtrl.config_check import rollout_spec
from mtrl.fp8_rules import check_fp8, check_fp8_widths
from mtrl.model_settings import FLEX, RECIPES, backend_of, weights_precision
from mtrl.models.backends import unsupported
from mtrl.models.config import ModelConfig
from mtrl.overlap_rules import check_overlap
from mtrl.parallel.capabilities import Survey, survey
from mtrl.parallel.errors import ConfigError
from mtrl.parallel.spec import ParallelSpec
from mtrl.rollout.fp8_weights import check_sliced, fp8_names

# What `Buffer.get_dispatch_config` of DeepEP 1.2.1 has an entry for.
_DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


@cache
def this_machine() -> Survey:
    """What is installed and works here; looked at once, in a child process."""
    return survey()


def check_acceleration(
    config: Config, actor: ParallelSpec, model: ModelConfig, ask: Callable[[], Survey] = this_machine
) -> None:
    """Raise ConfigError for what is asked for and cannot work: the key, what was given, the fix."""
    check_fp8(config, actor, model)
    _check_dispatch(config, actor, model)
    check_overlap(config, actor, model)
    _check_backend(config, model)
    _check_moe_backend(config, model)
    _check_fp8_rollout(config, model)
    _check_memory(config)
    _check_optimizer(config)
    check_fp8_widths(config, actor, model)
    is_native = backend_of(config) == "torch_native"
    if is_native and config.model.fp8.products == "scaled_mm" and ask().machine.gpu is not None:
        raise ConfigError(
            "model.fp8.products: scaled_mm, whose products torch rounds to bf16 on a GPU, block by block; "
            "write dequantised"
        )
    for key, feature, instead in _asked(config):
        obstacle = ask().obstacle(feature)
        if obstacle:
            raise ConfigError(f"{key}, which cannot be had here: {obstacle}; write {instead}")


def _asked(config: Config) -> Iterator[tuple[str, str, str]]:
    """What goes beyond plain torch: how it is asked for, the feature's name, what to write instead."""
    has_te = backend_of(config) == "transformer_engine"
    moe = config.actor.moe
    if has_te:
        yield "model.backend: transformer_engine", "transformer_engine", "model.backend=torch_native"
        if config.model.precision in RECIPES:
            yield f"model.precision: {config.model.precision}", config.model.precision, "model.precision=bf16"
    if moe.dispatcher in FLEX:
        yield f"actor.moe.dispatcher: {moe.dispatcher}", moe.dispatcher, "actor.moe.dispatcher=alltoall"
    if moe.permute_fusion:
        yield "actor.moe.permute_fusion: true", "permute_fusion", "actor.moe.permute_fusion=false"
    if config.actor.tp_comm_overlap:
        yield "actor.tp_comm_overlap: true", "tp_comm_overlap", "actor.tp_comm_overlap=false"
    if config.actor.optimizer.moments == "bf16":
        yield "actor.optimizer.moments: bf16", "bf16_moments", "actor.optimizer.moments=fp32"
    if (fraction := config.actor.optimizer.offload_fraction) > 0:
        key = "actor.optimizer.offload_fraction"
        yield f"{key}: {fraction:g}", "host_optimizer", f"{key}=0"
    if config.rollout.moe_backend == "flashinfer_cutlass":
        yield (
            "rollout.moe_backend: flashinfer_cutlass", "flashinfer_experts", "rollout.moe_backend=triton"
        )  # fmt: skip
    if config.rollout.sleep:
        yield "rollout.sleep: true", "sleep", "rollout.sleep=false"
    if _has_fp8_rollout(config):
        yield "rollout.dtype: fp8", "fp8_rollout", "rollout.dtype=bf16"


def _check_dispatch(config: Config, actor: ParallelSpec, model: ModelConfig) -> None:
    moe = config.actor.moe
    if model.moe is None and moe != MoeSection():
        raise ConfigError("actor.moe: given for a dense model, which has no experts; leave the section out")
    if moe.num_sms is not None and (moe.num_sms % 2 or moe.dispatcher not in FLEX):
        why = "is odd" if moe.num_sms % 2 else f"has no effect on dispatcher {moe.dispatcher}"
        raise ConfigError(
            f"actor.moe.num_sms: given {moe.num_sms}, which {why}; write null or an even number"
        )
    if moe.dispatcher not in FLEX:
        return
    if actor.ffn.ep * actor.ffn.etp == 1:
        raise ConfigError(
            f"actor.moe.dispatcher: given {moe.dispatcher} with {actor}, whose experts are on one rank, so "
            "nothing travels; write e2 or more in actor.backend, or actor.moe.dispatcher=alltoall"
        )
    num_ranks = actor.ffn.ep * actor.ffn.etp
    if moe.dispatcher == "deepep" and num_ranks not in _DEEPEP_RANKS:
        nearest = min(_DEEPEP_RANKS, key=lambda n: abs(n - num_ranks))
        raise ConfigError(
            f"actor.moe.dispatcher: given deepep with {actor}, whose experts are over {num_ranks} ranks, "
            f"which DeepEP 1.2.1 has no settings for; the nearest that it has is {nearest}, or write alltoall"
        )
    if config.model.precision == "fp32":
        raise ConfigError(
            f"actor.moe.dispatcher: given {moe.dispatcher} with model.precision fp32, but DeepEP's kernels "
            "send bf16; write model.precision=bf16, or actor.moe.dispatcher=alltoall"
        )


def _check_backend(config: Config, model: ModelConfig) -> None:
    if backend_of(config) != "transformer_engine":
        return
    # Where there is no GPU, the survey says so; here it is what would be said where there is one.
    reason = unsupported(model, precision=weights_precision(config), is_cuda=True)
    if reason:
        raise ConfigError(f"model.backend: transformer_engine: {reason}; write model.backend=torch_native")


def _has_fp8_rollout(config: Config) -> bool:
    return config.algorithm.name == "grpo" and config.rollout.dtype == "fp8"


def _check_fp8_rollout(config: Config, model: ModelConfig) -> None:
    """ModelError for a family whose experts are fused, LayoutError where blocks are cut."""
    if _has_fp8_rollout(config):
        fp8_names(model)
        check_sliced(model, rollout_spec(config), expert_parallel=config.rollout.expert_parallel)


def _check_moe_backend(config: Config, model: ModelConfig) -> None:
    if config.rollout.moe_backend == "triton":
        return
    reasons = {
        "with sft, which has no engine": config.algorithm.name != "grpo",
        "for a dense model, which has no experts": model.moe is None,
        "for experts with biases, which vLLM 0.32 leaves in their order while gate and up change places": (
            model.linear_bias
        ),
        "with rollout.dtype fp8, whose experts are computed with triton alone": _has_fp8_rollout(config),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"rollout.moe_backend: given {config.rollout.moe_backend} {reason}; write triton"
            )


def _check_optimizer(config: Config) -> None:
    optimizer, key = config.actor.optimizer, "actor.optimizer.offload_fraction"
    if optimizer.moments == "bf16" and not optimizer.distributed:
        raise ConfigError(
            "actor.optimizer.moments: bf16, which Megatron-Core has in its distributed optimizer alone; "
            "write actor.optimizer.distributed=true, or moments=fp32"
        )
    if not optimizer.offload_fraction:
        return
    given = f"{key}: given {optimizer.offload_fraction:g}"
    reasons = {
        "which checkpoints know in Megatron-Core's distributed optimizer alone; write "
        "actor.optimizer.distributed=true": not optimizer.distributed,
        "but what steps on the host keeps fp32 moments; write actor.optimizer.moments=fp32": (
            optimizer.moments == "bf16"
        ),
        "but Megatron-Core makes no such optimizer of fp32 weights; write model.precision=bf16": (
            config.model.precision == "fp32"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{given}, {reason}, or {key}=0")


def _check_memory(config: Config) -> None:
    has_engine = config.algorithm.name == "grpo"
    if not has_engine and config.actor.offload != "none":
        raise ConfigError(
            f"actor.offload: given {config.actor.offload} with sft, which has no engine to make room for; "
            "write none"
        )
    if not has_engine and config.rollout.sleep:
        raise ConfigError("rollout.sleep: true with sft, which has no engine; write false")
