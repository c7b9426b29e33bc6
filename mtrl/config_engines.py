"""The config's sections about engines: the model, the policy in training, the sampler, the reference.

Part of the tree of ``config.py``, under the same rules.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from mtrl.config_acceleration import Fp8Section, MoeSection, TrainingPrecision
from mtrl.config_types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Section,
)

Offload = Literal["none", "optimizer", "all"]
Decay = Literal["constant", "cosine", "linear"]
RecomputedModule = Literal["core_attn", "mlp", "moe", "shared_experts", "mla_up_proj", "layernorm"]


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
    """Layers of the trainer. ``auto`` is ``torch_native`` until Transformer Engine's have run on a GPU."""

    precision: TrainingPrecision = "bf16"
    """Dtype of weights and activations in the trainer; the optimizer's master weights are fp32 in all. FP8
    is bf16 with the layers' products in it: ``fp8_blockwise`` scales blocks as DeepSeek-V3 does,
    ``fp8_delayed`` whole tensors, ``mxfp8`` blocks of 32. torch_native has the first, slow and exact: what
    others are checked against."""

    fp8: Fp8Section = field(default_factory=Fp8Section)
    """How linears compute in FP8."""

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

    moments: Literal["fp32", "bf16"] = "fp32"
    """Dtype of Adam's moments between steps. bf16 halves them, through Transformer Engine's FusedAdam; needs
    ``distributed``. Checkpoints hold fp32 in both."""

    offload_fraction: Fraction = 0.0
    """Share of the parameters whose masters and moments live in host memory and whose steps are taken there,
    on a machine with a GPU (Megatron's ``HybridDeviceOptimizer``); needs ``distributed``, bf16 weights
    and fp32 ``moments``. ``actor.offload`` is something else: it moves what a GPU has away while the engine
    samples."""


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

    moe: MoeSection = field(default_factory=MoeSection)
    """How tokens travel to experts and back."""

    tp_comm_overlap: bool = False
    """Move tensor parallel ranks' tokens while products run, in Transformer Engine's user buffers. These have
    one shape, so every row is padded to ``algorithm.max_tokens_per_microbatch``: set it near to what samples
    fill. Needs ``t2`` or more within a node, sequence parallelism, and Transformer Engine's layers."""

    recompute: Literal["none", "full", "selective"] = "none"
    """Activations computed again in backward, which saves memory: whole layers, or ``recompute_modules``."""

    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """What ``selective`` recomputes: ``moe`` is a layer's router and experts, ``mlp`` a dense layer's; no
    effect otherwise. Megatron's ``moe_act`` is left out: it needs a grouped GEMM that is not used here."""

    offload: Offload = "none"
    """What of the trainer moves to host memory while the engine samples: ``optimizer`` is its state and the
    gradients, ``all`` the weights too. No effect on a result; for sft, which has no engine, ``none``."""

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

    process: Literal["trainer", "own"] = "trainer"
    """Where vLLM runs: in each rank's trainer process, or in one of its own beside it, whose weights the
    trainer's maps: shared memory on a CPU, CUDA IPC on a GPU. ``own`` keeps what vLLM changes in torch, and
    its crashes, out of the trainer, for a second process's memory on each rank. Linux only."""

    expert_parallel: bool = False
    """Whole experts on each ``t`` rank of an engine, not slices; no effect at t1 or on dense models."""

    moe_backend: Literal["triton", "flashinfer_cutlass"] = "triton"
    """vLLM's kernels for experts in bf16 on GPUs. On Hopper triton's are the faster ones, by what vLLM itself
    prefers; ``flashinfer_cutlass`` keeps gate and up the other way round, which a push does too."""

    n_samples: PositiveInt = 8
    """Completions of each prompt: the size of a group."""

    max_new_tokens: PositiveInt = 1024
    """Longest completion, in tokens."""

    temperature: PositiveFloat = 1.0
    """Divides the logits before sampling; the trainer divides by the same."""

    top_p: Annotated[float, Range(low=0.0, high=1.0, above=True)] = 1.0
    """Sample among the likeliest tokens that together have this probability; grpo needs 1: among all."""

    sleep: bool = False
    """Give the engine's memory, weights and KV cache, to the trainer while it trains; on a GPU only."""

    max_num_seqs: PositiveInt = 256
    """Sequences an engine decodes at a time."""

    kv_cache_bytes: PositiveInt = 2**30
    """Memory of the KV cache, in bytes on each rank."""

    dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Dtype of the engine's weights; ``auto`` is ``model.precision``, bf16 for FP8. ``fp8``, on GPUs only:
    layers' linears in e4m3 with a scale for 128 x 128, as DeepSeek-V3 is published, all else in bf16; a push
    quantises before weights travel. Sampler and trainer then differ by FP8's rounding, which
    ``algorithm.max_k3_kl`` has to allow."""

    verify: Literal["checksum", "logits", "off"] = "checksum"
    """What the first pushes are checked by: checksums of trainer's and engine's elements, or
    log-probabilities of some completions on both sides, within ``algorithm.max_k3_kl``."""

    verify_pushes: NonNegativeInt = 2
    """How many pushes, counted from the start of the process, are checked."""

    push_transport: Literal["auto", "collective", "shared_memory"] = "auto"
    """How weights travel between ranks: by torch.distributed's all-to-all, or, where all are processes of one
    machine with engines on the CPU, by writing to each other's engines. ``auto`` does that where it can."""

    push_bucket_bytes: PositiveInt = 2**28
    """Memory for travelling weights, in bytes on each rank; a larger tensor takes what it needs. Ranks that
    write to each other's engines take none, but for quantising to FP8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefSection(Section):
    """The reference policy of the KL penalty; no effect when ``algorithm.kl_coef`` is 0."""

    key: ClassVar[str] = "ref"

    backend: str = ""
    """Allocation string; empty: as the actor, and for now nothing else."""
