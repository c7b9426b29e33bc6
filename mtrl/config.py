"""The config: one tree of frozen sections, each default in one place.

The text under a field says what it is, its unit, and when it has no effect; ``docs/config.md`` is
made from it. Importing this needs neither torch nor Megatron nor vLLM. ``config_load.load_config``
reads a YAML file and overrides into this tree; ``config_check.check_config`` holds the rules
between keys. Paths are relative to the folder the command was started in.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from omegaconf import OmegaConf

from mtrl.config_types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Section,
)

Decay = Literal["constant", "cosine", "linear"]
RecomputedModule = Literal["core_attn", "mlp", "moe", "shared_experts", "mla_up_proj", "layernorm"]


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
class ModelSection(Section):
    """The model to start from: exactly one of ``path`` and ``init``."""

    key: ClassVar[str] = "model"

    path: str | None = None
    """Hugging Face folder with weights."""

    init: str | None = None
    """Hugging Face ``config.json``, or a folder with one, to start from weights drawn with ``seed``."""

    tokenizer: str | None = None
    """Folder of the tokenizer; null: the folder of ``path`` or ``init``."""

    backend: Literal["auto", "torch_native", "transformer_engine"] = "auto"
    """Layers of the trainer; ``auto`` is ``transformer_engine`` where it works, else ``torch_native``."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Dtype of weights and activations in the trainer; the optimizer's master weights are fp32 in both."""

    trust_remote_code: bool = False
    """Let transformers run Python code found in the model folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection(Section):
    """Adam with decoupled weight decay, and its learning rate over steps."""

    key: ClassVar[str] = "actor.optimizer"

    lr: PositiveFloat
    """Peak learning rate."""

    min_lr: NonNegativeFloat = 0.0
    """Rate at the last step; no effect when ``decay`` is constant."""

    warmup_steps: NonNegativeInt = 0
    """Steps in which the rate rises linearly from 0 to ``lr``."""

    decay: Decay = "constant"
    """Shape of the way from ``lr`` to ``min_lr`` after the warm-up."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay; not applied to biases and norms."""

    beta1: Fraction = 0.9
    """Decay of Adam's first moment."""

    beta2: Fraction = 0.95
    """Decay of Adam's second moment."""

    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""

    grad_clip: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    distributed: bool = True
    """Megatron's distributed optimizer: state is sharded over data parallel ranks; no effect at d1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection(Section):
    """How routers of mixtures of experts are trained; dense models take the defaults only.

    The step's loss is the mean over trained tokens plus, for every MoE layer, ``aux_loss_coeff`` * A +
    ``z_loss_coeff`` * Z. Z and A are means over all tokens but padding, trained or not; A over groups of
    tokens weighted by their size, of E * sum over experts of f * P with f the share of the group's choices
    and P the mean score, 1 where all experts get the same. Metrics report A and Z as means over layers. No
    token is ever dropped: a capacity of experts would make the result depend on which tokens share a rank.
    """

    key: ClassVar[str] = "actor.router"

    aux_loss: Literal["none", "microbatch", "sequence", "global_batch"] = "none"
    """Groups the load is balanced in. ``sequence``: each sample. ``global_batch``: the samples of one
    optimizer update, at the price of a second forward pass. Both are the same on every layout.
    ``microbatch``: one packed row, which depends on ``d`` and ``algorithm.max_tokens_per_microbatch``."""

    aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of A, such as 1.0e-3; needed by, and no effect without, ``aux_loss``."""

    z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of Z, the squared logsumexp of the router's logits, such as 1.0e-3; the same on every layout."""

    bias_update_rate: NonNegativeFloat = 0.0
    """What each update adds to the selection bias of experts with fewer choices than the mean, and takes from
    those with more, over all its samples; 0 keeps the bias. Needs a model that has one (DeepSeek-V3, GLM)."""

    freeze: bool = False
    """Keep routers' weights as they are; no loss or bias update may be asked for besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSection(Section):
    """The policy in training."""

    key: ClassVar[str] = "actor"

    backend: str
    """Allocation string, such as ``megatron:(attn:d2t4|ffn:e8)``; its world is the number of ranks."""

    optimizer: OptimizerSection
    """Optimizer and learning rate."""

    sequence_parallel: bool | Literal["auto"] = "auto"
    """Split norms and residuals over tensor parallel ranks; ``auto`` does so from t2 on, as MoE demands."""

    router: RouterSection = field(default_factory=RouterSection)
    """How routers of mixtures of experts are trained."""

    recompute: Literal["none", "full", "selective"] = "none"
    """Activations computed again in backward, which saves memory: whole layers, or ``recompute_modules``."""

    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """What ``selective`` recomputes: ``moe`` is a layer's router and experts, ``mlp`` a dense layer's; no
    effect otherwise. Megatron's ``moe_act`` is left out: it needs a grouped GEMM that is not used here."""

    virtual_pipeline_size: PositiveInt | None = None
    """Model chunks a pipeline stage holds (interleaved schedule); null for one. Needs ``p2`` or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSection(Section):
    """The engine that samples completions; no effect in sft."""

    key: ClassVar[str] = "rollout"

    backend: str = ""
    """Allocation string, such as ``vllm:d2t4``; needed by grpo. Its world is the actor's."""

    placement: Literal["colocated", "separate"] = "colocated"
    """``colocated``: on the actor's ranks, in its processes. ``separate`` is read and refused for now."""

    expert_parallel: bool = False
    """Whole experts on each ``t`` rank of an engine, not slices; no effect at t1 or on dense models."""

    n_samples: PositiveInt = 8
    """Completions of each prompt: the size of a group."""

    max_new_tokens: PositiveInt = 1024
    """Longest completion, in tokens."""

    temperature: PositiveFloat = 1.0
    """Divides the logits before sampling; the trainer divides by the same."""

    top_p: Annotated[float, Range(low=0.0, high=1.0, above=True)] = 1.0
    """Sample among the likeliest tokens that together have this probability; grpo needs 1: among all."""

    max_num_seqs: PositiveInt = 256
    """Sequences an engine decodes at a time."""

    kv_cache_bytes: PositiveInt = 2**30
    """Memory of the KV cache, in bytes on each rank."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the engine's weights; ``auto`` is ``model.precision``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefSection(Section):
    """The reference policy of the KL penalty; no effect when ``algorithm.kl_coef`` is 0."""

    key: ClassVar[str] = "ref"

    backend: str = ""
    """Allocation string; empty: as the actor, and for now nothing else."""


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
    """Hugging Face folders under ``output_dir/checkpoints``; one is always written at the end."""

    key: ClassVar[str] = "checkpoint"

    every_steps: NonNegativeInt = 0
    """Steps of the main phase between checkpoints; 0: only at the end."""

    keep_last: PositiveInt | None = None
    """How many to keep, older ones are deleted; null for all."""


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

    if_exists: Literal["refuse", "replace"] = "refuse"
    """What happens to an ``output_dir`` that is not empty: stop, or rename it to NAME.replaced-TIME."""

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
