"""Everything that can be checked before a process group exists: config, ranks, packages, model, data.

``prepare`` is run by every rank alike, reads only small files, and either returns a ``Job`` whose parts
fit each other or raises an error for the person who typed the command.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mtrl.acceleration import check_acceleration
from mtrl.batch import Prompt, Sample
from mtrl.config import Config
from mtrl.config_check import actor_spec, check_config, check_packages, rollout_spec
from mtrl.config_engines import RecomputedModule, RouterSection
from mtrl.data.load import load_prompts, load_samples
from mtrl.data.tokenizer import load_tokenizer
from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.models.hf_folder import check_names, folder_shapes
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap, check_model_fits
from mtrl.parallel.errors import ConfigError, LayoutError, ModelError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import ParallelSpec, RolloutSpec
from mtrl.rewards import Reward, load_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run whose inputs have been read and fit each other. ``rollout`` is None for SFT.

    ``reward`` scores training completions, ``eval_reward`` held-out ones (they differ only in the control
    run with shuffled rewards).
    """

    config: Config
    actor: ParallelSpec
    rollout: RolloutSpec | None
    model: ModelConfig
    tokenizer: Any
    train_prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    train_samples: Sequence[Sample]
    warm_start_samples: Sequence[Sample]
    reward: Reward | None
    eval_reward: Reward | None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: the tokenizer's end of sequence."""
        return (int(self.tokenizer.eos_token_id),)

    @property
    def pad_token_id(self) -> int:
        """What fills rows; any token does, since padding is never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    @property
    def max_model_len(self) -> int:
        """Longest prompt with its completion, in tokens, in training and evaluation."""
        config = self.config
        longest = max((len(p.tokens) for p in (*self.train_prompts, *self.eval_prompts)), default=0)
        return longest + max(config.rollout.max_new_tokens, config.eval_max_new_tokens)


def prepare(config: Config, world_size: int) -> Job:
    """Check everything and read the data. Not collective.

    Raises:
        ConfigError, SpecError, LayoutError, ModelError, DataError, MissingPackageError: what was given,
            what is needed, and the fix.
    """
    check_config(config, world_size)
    check_packages(config)
    actor = actor_spec(config)
    model = _check_model(config, actor)
    tokenizer = load_tokenizer(config.tokenizer_path, trust_remote_code=config.model.trust_remote_code)
    is_grpo = config.algorithm.name == "grpo"
    longest = config.algorithm.max_tokens_per_microbatch

    def prompts(path: str | None, limit: int | None = None) -> Sequence[Prompt]:
        if path is None or not is_grpo:
            return ()
        size = config.max_prompt_length
        return load_prompts(
            Path(path), tokenizer, max_prompt_length=size, limit=limit, overlong=config.data.overlong
        )

    def samples(path: str | None) -> Sequence[Sample]:
        if path is None:
            return ()
        return load_samples(Path(path), tokenizer, max_length=longest, overlong=config.data.overlong)

    warm_start = config.algorithm.warm_start if is_grpo else None
    job = Job(
        config=config,
        actor=actor,
        rollout=rollout_spec(config) if is_grpo else None,
        model=model,
        tokenizer=tokenizer,
        train_prompts=prompts(config.data.train),
        eval_prompts=prompts(config.data.eval, config.evaluation.num_prompts),
        train_samples=() if is_grpo else samples(config.data.train),
        warm_start_samples=samples(config.data.warm_start) if warm_start else (),
        reward=load_reward(config.reward.name, seed=config.seed) if is_grpo else None,
        eval_reward=load_reward(config.reward.name.removeprefix("shuffled:"), seed=config.seed)
        if is_grpo
        else None,
    )
    _check_lengths(job)
    return job


def _check_model(config: Config, actor: ParallelSpec) -> ModelConfig:
    model = load_model_config(Path(config.model.path or config.model.init or ""))
    check_model_fits(model, actor)
    stages = Stages.balanced(model.num_layers, actor.attn.pp, config.actor.virtual_pipeline_size or 1)
    _check_sequence_parallel(config, actor, model)
    _check_router(config, model)
    _check_recompute(config, model)
    check_acceleration(config, actor, model)
    if config.model.path:
        weights = WeightMap(config=model, layout=RankLayout.from_spec(actor), stages=stages, places={})
        found = folder_shapes(Path(config.model.path))
        check_names(model, weights.in_format_of(found).hf_shapes(), found)
    if config.algorithm.name == "grpo":
        _check_engine_fits(model, rollout_spec(config))
    return model


def _check_sequence_parallel(config: Config, actor: ParallelSpec, model: ModelConfig) -> None:
    given = config.actor.sequence_parallel
    if given is True and actor.attn.tp == 1:
        raise ConfigError(
            f"actor.sequence_parallel: true with {actor}, which has no tensor parallel ranks to share a "
            "sequence; write auto, or t2 or more in actor.backend"
        )
    if given is False and actor.attn.tp > 1 and model.moe is not None:
        raise ConfigError(
            f"actor.sequence_parallel: false with {actor} and a mixture of experts, which Megatron-Core "
            "trains over tensor parallel ranks only with it; write auto"
        )


def _check_router(config: Config, model: ModelConfig) -> None:
    router = config.actor.router
    if model.moe is None and router != RouterSection():
        raise ConfigError(
            "actor.router: given for a dense model, which has no routers; leave the section out"
        )
    if router.bias_update_rate and not (model.moe and model.moe.selection_bias):
        raise ConfigError(
            f"actor.router.bias_update_rate: given {router.bias_update_rate:g}, but this model's routers "
            "have no selection bias; balance them with actor.router.aux_loss, or write 0"
        )


def _check_recompute(config: Config, model: ModelConfig) -> None:
    if config.actor.recompute != "selective":
        return
    has = {
        "mlp": len(model.moe_layers) < model.num_layers,
        "moe": model.moe is not None,
        "shared_experts": bool(model.moe and model.moe.shared_hidden_size),
        "mla_up_proj": model.mla is not None,
    }
    modules = config.actor.recompute_modules
    lacking = [name for name in modules if not has.get(name, True)]
    if lacking or not modules:
        fits = ", ".join(name for name in get_args(RecomputedModule) if has.get(name, True))
        raise ConfigError(
            f"actor.recompute_modules: given [{', '.join(modules)}], of which this model has no "
            f"{', '.join(lacking) or 'part'}; it has {fits}"
        )


def _check_engine_fits(model: ModelConfig, rollout: RolloutSpec) -> None:
    tp, world_size = rollout.tp, rollout.world_size
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if heads % tp or kv_heads % tp:
        fits = max(n for n in range(1, tp) if not (heads % n or kv_heads % n or world_size % n))
        raise LayoutError(
            f"rollout.backend: t{tp} does not divide {heads} attention heads and {kv_heads} KV heads; write "
            f"vllm:d{world_size // fits}t{fits}"
        )
    if model.family in ("qwen2", "qwen2_moe") and model.head_dim * heads != model.hidden_size:
        # vllm 0.32, models/qwen2.py and qwen2_moe.py: its loader then reads a part of each projection.
        raise ModelError(
            f"config.json: head_dim {model.head_dim}, but for that of every {model.family} model vLLM takes "
            f"hidden_size / num_attention_heads = {model.hidden_size // heads} and would read a part of its "
            "attention weights; such a model can be trained by sft only"
        )


def _check_lengths(job: Job) -> None:
    """Check token ids and lengths against the model."""
    vocabulary = len(job.tokenizer)
    if vocabulary > job.model.vocab_size:
        raise ModelError(
            f"the tokenizer at {job.config.tokenizer_path} has {vocabulary} tokens, the model's vocab_size "
            f"is {job.model.vocab_size}; they are not of one model"
        )
    every = (*job.train_samples, *job.warm_start_samples)
    longest = max((len(sample.tokens) for sample in every), default=0)
    if job.rollout is not None:
        longest = max(longest, job.max_model_len)
    if longest > job.model.max_position_embeddings:
        fix = "lower rollout.max_new_tokens or data.max_prompt_length"
        if job.rollout is None or longest > job.max_model_len:
            fix = "lower algorithm.max_tokens_per_microbatch to that and set data.overlong to drop"
        raise LayoutError(
            f"sequences of up to {longest} tokens, but the model's max_position_embeddings is "
            f"{job.model.max_position_embeddings}; {fix}"
        )
