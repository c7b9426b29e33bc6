"""The config: one tree of frozen sections, each default in one place.

The text under a field says what it is, its unit, and when it has no effect; ``docs/config.md`` is
made from it. Importing this needs neither torch nor Megatron nor vLLM. ``config_load.load_config``
reads a YAML file and overrides into this tree; ``config_check.check_config`` holds the rules
between keys. Paths are relative to the folder the command was started in.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from omegaconf import OmegaConf

from mtrl.config_engines import ActorSection, ModelSection, RefSection, RolloutSection
from mtrl.config_types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartSection(Section):
    """A phase of supervised fine-tuning (SFT) before the first rollout, so that one command runs both."""

    key: ClassVar[str] = "algorithm.warm_start"

    total_steps: PositiveInt
    """Optimizer steps of this phase; with ``until_accuracy``, at most."""

    until_accuracy: Fraction | None = None
    """End the phase once this share of ``data.eval`` is answered right, greedily; null: never early."""

    evaluate_every: PositiveInt = 10
    """Steps between the evaluations that ``until_accuracy`` asks for; no effect without it."""

    samples_per_step: PositiveInt
    """Samples of ``data.warm_start`` in each step, over all ranks."""

    learning_rate: PositiveFloat
    """Learning rate of this phase, constant after its warm-up; other settings are ``actor.optimizer``'s."""

    warmup_steps: NonNegativeInt = 0
    """Steps in which the rate rises linearly from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmSection(Section):
    """What is learned from what, and how much of it in a step."""

    key: ClassVar[str] = "algorithm"

    name: Literal["grpo", "sft"]
    """``grpo``: sample, reward, improve. ``sft``: imitate ``data.train``."""

    total_steps: PositiveInt
    """Steps of the main phase. A GRPO step is one batch of rollouts, an SFT step one optimizer update."""

    prompts_per_step: PositiveInt | None = None
    """Prompts sampled in a step, over all ranks; needed by grpo, no effect in sft."""

    samples_per_step: PositiveInt | None = None
    """Samples in a step, over all ranks; needed by sft, no effect in grpo."""

    minibatches_per_step: PositiveInt = 1
    """Optimizer updates made from one batch of rollouts; no effect in sft."""

    max_tokens_per_microbatch: PositiveInt
    """Tokens in one microbatch of one data parallel rank: bounds activation memory and the longest sample."""

    clip_eps_low: Fraction = 0.2
    """The probability ratio is clipped below at 1 - this; no effect in sft."""

    clip_eps_high: NonNegativeFloat = 0.2
    """The probability ratio is clipped above at 1 + this; no effect in sft."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Reward less its group's mean; ``grpo``: over its deviation; ``rloo``: less the others' mean."""

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty to the reference, the weights at the first rollout; 0 keeps no reference."""

    sampler_correction: NonNegativeFloat = 0.0
    """Cap of the weight p_trainer / p_sampler that multiplies a token's loss; 0 leaves the weight out."""

    max_k3_kl: PositiveFloat = 0.01
    """A step whose ``k3_kl`` (nats a token) is above this stops the run; bf16 MoE usually has 1.5e-3."""

    warm_start: WarmStartSection | None = None
    """SFT on ``data.warm_start`` before the first rollout; null for none, no effect in sft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection(Section):
    """JSONL files or Hugging Face ``datasets`` folders."""

    key: ClassVar[str] = "data"

    train: str
    """Prompts with answers (grpo), or completions, messages or token ids to imitate (sft)."""

    eval: str | None = None
    """Held-out prompts with answers; null for no evaluation."""

    warm_start: str | None = None
    """What ``algorithm.warm_start`` imitates; no effect without it."""

    max_prompt_length: PositiveInt | None = None
    """Longest prompt, in tokens; null: what ``rollout.max_new_tokens`` leaves of a microbatch."""

    overlong: Literal["error", "drop"] = "error"
    """A longer prompt, or an SFT sample over a microbatch: stop before launch, or leave it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSection(Section):
    """What makes a completion good."""

    key: ClassVar[str] = "reward"

    name: str = ""
    """A reward of mtrl's by name, or ``module:function`` of your own; needed by grpo, no effect in sft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSection(Section):
    """Greedy decoding of ``data.eval``, before and after training and in between; no effect without it."""

    key: ClassVar[str] = "evaluation"

    every_steps: NonNegativeInt = 0
    """Steps of the main phase between evaluations; 0: only before and after."""

    num_prompts: PositiveInt | None = None
    """How many prompts, the first of the file; null for all."""

    max_new_tokens: PositiveInt | None = None
    """Longest answer, in tokens; null: ``rollout.max_new_tokens``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection(Section):
    """Folders under ``output_dir/checkpoints`` that transformers and vLLM open and a run goes on from.

    One is written at the end, and when the run is asked to stop (SIGTERM, Ctrl-C); ``if_exists: resume`` goes
    on.
    """

    key: ClassVar[str] = "checkpoint"

    every_steps: NonNegativeInt = 0
    """Steps of a phase, warm start or main, between checkpoints; 0: none in between."""

    keep_last: PositiveInt | None = None
    """How many to keep, older ones are deleted; null for all."""

    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of this are kept besides; no effect without ``keep_last``."""

    contents: Literal["all", "weights"] = "all"
    """``weights`` leaves the optimizer's state out, three quarters of the bytes and more; a run cannot go on
    from such a checkpoint, only start from it as from any model."""

    asynchronous: bool = False
    """Write in the background from a copy in host memory, as large as what a rank writes."""

    on_damage: Literal["refuse", "previous"] = "refuse"
    """When the newest checkpoint is damaged: stop, or go on from the newest whole one before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingSection(Section):
    """Where a step's numbers go besides ``metrics.jsonl``."""

    key: ClassVar[str] = "logging"

    tensorboard: bool = True
    """Write TensorBoard events under ``output_dir/tensorboard``."""

    wandb: bool = False
    """Log to Weights & Biases; needs the package and a login (or ``WANDB_MODE=offline``)."""

    wandb_project: str = "mtrl"
    """Project the run is filed under; no effect when ``wandb`` is false."""

    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """What rank 0 shows; ``auto`` is ``bar`` on a terminal and ``lines`` elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Section):
    """A whole run."""

    key: ClassVar[str] = ""

    seed: NonNegativeInt = 1
    """Seed of weights, data order and sampling: the same config and seed repeat a run."""

    deterministic: bool = False
    """On GPUs, train with deterministic kernels only, slower; weights then repeat bit for bit on a layout,
    as on CPU they always do. vLLM's kernels are its own: what it samples on a GPU may differ."""

    output_dir: str
    """Folder everything a run writes goes to; all nodes must see it under the same path."""

    if_exists: Literal["refuse", "replace", "resume"] = "refuse"
    """What happens to an ``output_dir`` that is not empty: stop, rename it to NAME.replaced-TIME, or go on
    from its newest checkpoint, under this config's layout (from the start, if there is none)."""

    algorithm: AlgorithmSection
    model: ModelSection = field(default_factory=ModelSection)
    actor: ActorSection
    rollout: RolloutSection = field(default_factory=RolloutSection)
    ref: RefSection = field(default_factory=RefSection)
    data: DataSection
    reward: RewardSection = field(default_factory=RewardSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @property
    def max_prompt_length(self) -> int:
        """``data.max_prompt_length``, or what the longest completion leaves of a microbatch; tokens."""
        room = self.algorithm.max_tokens_per_microbatch - self.rollout.max_new_tokens
        return self.data.max_prompt_length or room

    @property
    def eval_max_new_tokens(self) -> int:
        """``evaluation.max_new_tokens``, or ``rollout.max_new_tokens``; tokens."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens

    @property
    def tokenizer_path(self) -> Path:
        """``model.tokenizer``, or the folder that the model comes from."""
        source = Path(self.model.tokenizer or self.model.path or self.model.init or "")
        return source.parent if source.suffix == ".json" else source

    def to_yaml(self) -> str:
        """The resolved config; ``load_config`` reads it back to an equal value."""
        return OmegaConf.to_yaml(OmegaConf.create(asdict(self)))
