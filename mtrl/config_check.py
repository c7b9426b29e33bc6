"""The rules between config keys, and between the config and the number of ranks started.

Checked once, on every rank alike, before a process group or a GPU is touched; nothing here is
collective or reads files. What a spec asks of a model (heads, experts, layers) is checked in ``models/``.
"""

import importlib.util
import os
import sys

from mtrl.config import Config
from mtrl.config_engines import RouterSection
from mtrl.parallel.determinism import check_environment
from mtrl.parallel.errors import ConfigError, LayoutError, MissingPackageError, SpecError
from mtrl.parallel.spec import (
    ParallelSpec,
    RolloutSpec,
    parse_rollout_spec,
    parse_training_spec,
    refuse_unsupported,
)

RANKS_PER_NODE = 8
_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def world_size_from_env() -> int:
    """WORLD_SIZE as torchrun sets it; 1 when started without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE is {text!r}, needs a positive integer; start with torchrun")
    return int(text)


def check_config(config: Config, world_size: int) -> None:
    """Raise what is wrong with ``config`` on ``world_size`` ranks.

    ConfigError (keys), SpecError (strings), LayoutError (numbers of ranks). Packages: `check_packages`.
    """
    _check_model(config)
    actor = actor_spec(config)
    _check_schedule(config)
    _check_actor(config, actor)
    _check_router(config.actor.router)
    if config.deterministic:
        check_environment()
    if config.algorithm.name == "grpo":
        _check_grpo(config)
        _check_rollout(config, actor, rollout_spec(config))
        _check_sampling_length(config)
        _check_ref(config, actor)
    else:
        _check_sft(config)
    _check_world("actor.backend", actor, world_size)


def actor_spec(config: Config) -> ParallelSpec:
    """``actor.backend``, parsed; a backend that mtrl does not run is a SpecError that says what to write."""
    try:
        spec = parse_training_spec(config.actor.backend)
        refuse_unsupported(spec)
    except SpecError as error:
        raise _named("actor.backend", error) from error
    return spec


def rollout_spec(config: Config) -> RolloutSpec:
    """``rollout.backend``, parsed, for grpo; refusals as in `actor_spec`."""
    if not config.rollout.backend:
        raise ConfigError("rollout.backend: missing, grpo needs an engine to sample with, such as vllm:d2t4")
    try:
        spec = parse_rollout_spec(config.rollout.backend)
        refuse_unsupported(spec)
    except SpecError as error:
        raise _named("rollout.backend", error) from error
    return spec


def check_packages(config: Config) -> None:
    """Raise MissingPackageError, with the install line, for an optional package that ``config`` asks for."""
    # Presence only: importing vLLM fixes settings that the engine still has to make.
    needed = {
        "vllm": config.algorithm.name == "grpo",
        "wandb": config.logging.wandb,
    }
    reasons = {
        "vllm": "grpo samples with it; without a GPU `make install`, with one `pip install vllm==0.32.0`",
        "wandb": "logging.wandb is true; `pip install wandb`, or logging.wandb=false",
    }
    for package, asked in needed.items():
        if asked and importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{package} is not installed: {reasons[package]}")


def torchrun_line(world_size: int) -> str:
    """The command that starts ``world_size`` ranks, on nodes of eight when one node is not enough."""
    if world_size <= RANKS_PER_NODE:
        return f"torchrun --nproc-per-node {world_size} mtrl/train.py CONFIG"
    nodes, rest = divmod(world_size, RANKS_PER_NODE)
    if rest:
        return f"torchrun --nnodes N --nproc-per-node M mtrl/train.py CONFIG, with N * M = {world_size}"
    return f"torchrun --nnodes {nodes} --nproc-per-node {RANKS_PER_NODE} mtrl/train.py CONFIG, on each node"


def _named(key: str, error: SpecError) -> SpecError:
    return SpecError(f"{key}: {error.reason}", error.text, error.column)


def _check_world(key: str, spec: ParallelSpec, world_size: int) -> None:
    if spec.world_size != world_size:
        raise LayoutError(
            f"{key}: {spec} needs {spec.world_size} ranks and {world_size} were started; start it with\n"
            f"  {torchrun_line(spec.world_size)}\n"
            f"or write a spec of {world_size} ranks, such as megatron:d{world_size}"
        )


def _check_model(config: Config) -> None:
    model = config.model
    if bool(model.path) == bool(model.init):
        given = f"both ({model.path} and {model.init})" if model.path else "neither"
        raise ConfigError(
            f"model.path, model.init: given {given}, needs exactly one; path is a Hugging Face folder with "
            "weights, init a config.json to start from random weights"
        )


def _check_schedule(config: Config) -> None:
    optimizer, algorithm = config.actor.optimizer, config.algorithm
    updates_per_step = algorithm.minibatches_per_step if algorithm.name == "grpo" else 1
    num_updates = algorithm.total_steps * updates_per_step
    if optimizer.warmup_steps > num_updates:
        raise ConfigError(
            f"actor.optimizer.warmup_steps: given {optimizer.warmup_steps}, needs at most {num_updates}, "
            "the optimizer updates of the run"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"actor.optimizer.min_lr: given {optimizer.min_lr:g}, needs at most lr = {optimizer.lr:g}"
        )
    warm_start = algorithm.warm_start
    if warm_start is not None and warm_start.warmup_steps > warm_start.total_steps:
        raise ConfigError(
            f"algorithm.warm_start.warmup_steps: given {warm_start.warmup_steps}, needs at most "
            f"total_steps = {warm_start.total_steps}"
        )


def _check_actor(config: Config, actor: ParallelSpec) -> None:
    chunks = config.actor.virtual_pipeline_size or 1
    if chunks > 1 and actor.attn.pp == 1:
        raise ConfigError(
            f"actor.virtual_pipeline_size: given {chunks} with {actor}, which has one pipeline stage; "
            "write p2 or more in actor.backend, or leave it null"
        )


def _check_router(router: RouterSection) -> None:
    if (router.aux_loss == "none") != (router.aux_loss_coeff == 0.0):
        raise ConfigError(
            f"actor.router.aux_loss: given {router.aux_loss} with aux_loss_coeff {router.aux_loss_coeff:g}; "
            "give both, such as sequence and 1.0e-3, or neither"
        )
    if router.freeze and (router.aux_loss_coeff or router.z_loss_coeff or router.bias_update_rate):
        raise ConfigError(
            "actor.router.freeze: true with a loss or a bias update of routers, whose weights are then kept; "
            "write freeze=false, or 0 for aux_loss_coeff, z_loss_coeff and bias_update_rate"
        )


def _check_sft(config: Config) -> None:
    if config.algorithm.samples_per_step is None:
        raise ConfigError("algorithm.samples_per_step: missing, sft needs it; such as 64")
    if config.algorithm.warm_start is not None:
        raise ConfigError("algorithm.warm_start: given with sft, where it has no place; write null")
    if config.data.eval is not None or config.evaluation.every_steps:
        raise ConfigError(
            "data.eval: given with sft, which starts no engine to sample with; leave data.eval and "
            "evaluation.every_steps out, or evaluate the checkpoint afterwards"
        )


def _check_grpo(config: Config) -> None:
    algorithm = config.algorithm
    if algorithm.prompts_per_step is None:
        raise ConfigError("algorithm.prompts_per_step: missing, grpo needs it; such as 64")
    num_samples = algorithm.prompts_per_step * config.rollout.n_samples
    if algorithm.minibatches_per_step > num_samples:
        raise ConfigError(
            f"algorithm.minibatches_per_step: given {algorithm.minibatches_per_step}, needs at most "
            f"{num_samples}, the completions of a step ({algorithm.prompts_per_step} prompts of "
            f"{config.rollout.n_samples})"
        )
    if not config.reward.name:
        raise ConfigError("reward.name: missing, grpo needs one; such as exact_match, or module:function")
    if config.rollout.n_samples == 1:
        raise ConfigError(
            "rollout.n_samples: given 1, needs at least 2; alone in its group a completion equals the mean, "
            "so every advantage is 0"
        )
    if config.rollout.top_p != 1.0:
        raise ConfigError(
            f"rollout.top_p: given {config.rollout.top_p:g}, grpo needs 1; below it the engine's "
            "probabilities are those among the kept tokens, which the trainer does not compute"
        )
    if (algorithm.warm_start is None) != (config.data.warm_start is None):
        has, lacks = ("algorithm", "data") if config.data.warm_start is None else ("data", "algorithm")
        raise ConfigError(
            f"{lacks}.warm_start: missing while {has}.warm_start is given; algorithm.warm_start says how "
            "long, data.warm_start on what; give both or neither"
        )
    if algorithm.warm_start and algorithm.warm_start.until_accuracy is not None and config.data.eval is None:
        raise ConfigError(
            "algorithm.warm_start.until_accuracy: given without data.eval, whose prompts it is measured on; "
            "give a file of held-out prompts, or write null"
        )
    if config.evaluation.every_steps and config.data.eval is None:
        raise ConfigError(
            f"data.eval: missing while evaluation.every_steps is {config.evaluation.every_steps}; give a "
            "file of held-out prompts, or write evaluation.every_steps=0"
        )


def _check_rollout(config: Config, actor: ParallelSpec, rollout: RolloutSpec) -> None:
    if config.rollout.placement == "separate":
        raise ConfigError(
            "rollout.placement: separate is not run yet; write colocated, which samples on the actor's ranks"
        )
    _check_process(config)
    if rollout.pp > 1:
        raise ConfigError(
            f"rollout.backend: {rollout} has {rollout.pp} pipeline stages, which engines in the trainer's "
            f"process do not run; write vllm:d{rollout.dp}t{rollout.tp * rollout.pp}"
        )
    if rollout.world_size != actor.world_size:
        raise LayoutError(
            f"rollout.backend: {rollout} has {rollout.world_size} ranks and actor.backend {actor} has "
            f"{actor.world_size}; colocated engines share the actor's ranks: write {_resized(rollout, actor)}"
        )


def _check_process(config: Config) -> None:
    if config.rollout.process == "trainer":
        return
    allocator = next(
        (name for name in _ALLOCATORS if "expandable_segments:True" in os.environ.get(name, "")), ""
    )
    reasons = {
        f"on {sys.platform}, and processes have memory in common on Linux alone": sys.platform != "linux",
        "with rollout.sleep, whose memory no other process can map": config.rollout.sleep,
        f"with expandable_segments in {allocator}, memory that CUDA IPC does not map": bool(allocator),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"rollout.process: own {reason}; write rollout.process=trainer, or do without")


def _resized(rollout: RolloutSpec, actor: ParallelSpec) -> str:
    """The rollout string with the actor's world: the same tp where it divides, else one rank an engine."""
    dp, rest = divmod(actor.world_size, rollout.tp)
    return f"vllm:d{actor.world_size}" if rest else f"vllm:d{dp}t{rollout.tp}"


def _check_sampling_length(config: Config) -> None:
    room = config.algorithm.max_tokens_per_microbatch
    prompt, completion = config.data.max_prompt_length or 1, config.rollout.max_new_tokens
    if prompt + completion > room:
        raise ConfigError(
            f"algorithm.max_tokens_per_microbatch: given {room}, needs at least {prompt + completion}: "
            f"a prompt of {prompt} and rollout.max_new_tokens = {completion} make one sample, never split"
        )


def _check_ref(config: Config, actor: ParallelSpec) -> None:
    if not config.ref.backend:
        return
    try:
        ref = parse_training_spec(config.ref.backend)
    except SpecError as error:
        raise _named("ref.backend", error) from error
    if (ref.backend, ref.attn, ref.ffn) != (actor.backend, actor.attn, actor.ffn):
        raise ConfigError(
            f"ref.backend: given {ref}, but a reference under another layout than the actor's ({actor}) is "
            'not run yet; leave it empty: ref.backend=""'
        )
