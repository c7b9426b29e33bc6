"""What gpu.py trains: a Qwen3-MoE that fills the card, by mtrl and by transformers; what a step costs.

Legend of the formulas: F hidden size, H query heads, G KV heads, D head dim, E experts, K chosen experts, J
expert hidden size, V vocabulary, S tokens of a sample.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mtrl.batch import Sample
from mtrl.config_engines import OptimizerSection
from mtrl.models.backends import Backend
from mtrl.models.builder import build_model
from mtrl.models.families import load_model_config
from mtrl.models.hf import initialize
from mtrl.models.precision import Fp8
from mtrl.objectives import SftLoss
from mtrl.parallel import groups as parallel_groups
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import ConfigError
from mtrl.parallel.groups import ParallelGroups
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from mtrl.policy import make_microbatches
from mtrl.trainer import Trainer

Side = Literal["torch_native", "transformer_engine", "transformers"]
PrecisionName = Literal["fp32", "bf16", "fp8_blockwise", "fp8_delayed"]
LR, CLIP, BETAS, EPS = 1e-4, 1.0, (0.9, 0.95), 1e-8
FILL = 0.9
"""Share of the free memory that the estimate may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Who computes, and in what."""

    side: Side
    precision: PrecisionName

    @classmethod
    def parse(cls, text: str) -> "Way":
        """The inverse of ``str``."""
        side, precision = text.split()
        return cls(side=cast(Side, side), precision=cast(PrecisionName, precision))

    def __str__(self) -> str:
        return f"{self.side} {self.precision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Qwen3-MoE and a step's batch: ``num_microbatches`` rows of ``row_samples`` samples."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_hidden_size: int
    vocab_size: int
    sample_tokens: int
    row_samples: int
    num_microbatches: int

    def hf_config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
            "hidden_act": "silu", "initializer_range": 0.02, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
            "max_position_embeddings": max(512, self.sample_tokens), "head_dim": self.head_dim,
            "hidden_size": self.hidden_size, "intermediate_size": 4 * self.hidden_size,
            "moe_intermediate_size": self.expert_hidden_size, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads, "num_hidden_layers": self.num_layers,
            "num_experts": self.num_experts, "num_experts_per_tok": self.top_k, "vocab_size": self.vocab_size,
        }  # fmt: skip

    @property
    def row_tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.sample_tokens * self.row_samples

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.row_tokens * self.num_microbatches

    @property
    def num_weights(self) -> int:
        """All of them: embedding and output layer, and for each layer attention, router, experts and norms.

        >>> QWEN3_30B_A3B.num_weights
        30532122624
        """
        norms = self.num_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        return self._multiplying(self.num_experts) + self.hidden_size * self.vocab_size + norms

    @property
    def num_active(self) -> int:
        """Weights that multiply each token: the output layer is among them, the embedding is not."""
        return self._multiplying(self.top_k)

    def _multiplying(self, num_experts: int) -> int:
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        experts = 3 * num_experts * self.hidden_size * self.expert_hidden_size
        router = self.hidden_size * self.num_experts
        return self.num_layers * (attention + experts + router) + self.hidden_size * self.vocab_size

    @property
    def flops_per_token(self) -> int:
        """6 N + 6 L H D S: forward and backward of PaLM's appendix B (arXiv 2204.02311), N the weights that
        multiply a token. Attention is half of what stands there, since of the scores causality needs half.
        """
        attention = 6 * self.num_layers * self.num_heads * self.head_dim * self.sample_tokens
        return 6 * self.num_active + attention


QWEN3_30B_A3B = Size(
    hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128, top_k=8,
    expert_hidden_size=768, vocab_size=151936, sample_tokens=4096, row_samples=2, num_microbatches=8,
)  # fmt: skip
TINY = Size(
    hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=8, top_k=2,
    expert_hidden_size=128, vocab_size=512, sample_tokens=64, row_samples=4, num_microbatches=2,
)  # fmt: skip


def filling(free_bytes: int) -> Size:
    """Layers of Qwen3-30B-A3B, as many as fit in `FILL` of the free memory, in bf16 and in FP8.

    The vocabulary is 32768, so that the output layer keeps about the share of the work that it has in 48
    layers. Where not even four layers fit, there are fewer experts.

    Raises:
        ConfigError: four layers with 16 experts do not fit.
    """
    base = replace(QWEN3_30B_A3B, vocab_size=32768)
    ways = [Way(side="transformer_engine", precision=each) for each in ("bf16", "fp8_blockwise")]
    for num_experts in (128, 64, 32, 16):
        for num_layers in range(base.num_layers, 3, -1):
            size = replace(base, num_layers=num_layers, num_experts=num_experts)
            needed = max(estimate_bytes(size, way, fused_adam=False) for way in ways)
            if needed <= FILL * free_bytes:
                return size
    raise ConfigError(
        f"{free_bytes / 1e9:.1f} GB are free, and the smallest model of this measurement needs "
        f"{needed / FILL / 1e9:.1f} GB; use a larger GPU, or --size tiny"
    )


def estimate_bytes(size: Size, way: Way, *, fused_adam: bool) -> int:
    """Peak memory of a step of mtrl, in bytes.

    Per weight: 2 of bf16, 4 of the gradient that Megatron sums in fp32, 4 of the master, 8 of Adam's moments
    (16 without a master in fp32); under FP8 2 more, e4m3 of each weight and of its transpose. To it comes the
    larger of what backward needs and what Adam does: torch's Adam over lists takes 4 a weight for a while, a
    fused one nothing.

    Activations per token are what autograd keeps of torch_native, counted with ``saved_tensors_hooks``. A
    layer: in the weights' dtype 2 F (linears' inputs), 3 (H + G) D (queries, keys, values, output) and
    K (F + 5 J) (experts); in fp32 4 F (norms) and 2 (H + G) D (norms of queries and keys); 10 bytes an expert
    (router). Besides, 20 bytes a logit, and one layer's K (4 F + 6 J) gradients.
    """
    per_weight = 16 if way.precision == "fp32" else 18
    if way.precision.startswith("fp8"):
        per_weight += 2
    itemsize = 4 if way.precision == "fp32" else 2
    hidden, expert = size.hidden_size, size.expert_hidden_size
    heads = (size.num_heads + size.num_kv_heads) * size.head_dim
    layer = itemsize * (2 * hidden + 3 * heads + size.top_k * (hidden + 5 * expert))
    layer += 4 * (4 * hidden + 2 * heads) + 10 * size.num_experts
    gradients = itemsize * size.top_k * (4 * hidden + 6 * expert)
    per_token = size.num_layers * layer + 8 * hidden + 20 * size.vocab_size + gradients
    adam = 0 if fused_adam else 4 * size.num_weights
    return per_weight * size.num_weights + max(size.row_tokens * per_token, adam)


Step = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A side ready to train: ``step`` is a step on the same batch each time and returns its loss."""

    step: Step
    note: str = ""
    trainer: Trainer | None = None


def alone() -> ParallelGroups:
    """The groups of one process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    parallel_groups.init_distributed(timeout_s=120)
    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec("megatron:d1")))
    parallel_groups.seed_everything(1, groups)
    return groups


def leave() -> None:
    """End what `alone` began: a process that ends with gloo's threads running may abort."""
    if torch.distributed.is_initialized():
        parallel_groups.destroy()
        torch.distributed.destroy_process_group()


def make_batch(size: Size) -> list[Sample]:
    """A step's samples: random tokens, every one but the first trained."""
    generator = torch.Generator().manual_seed(1)
    shape = (size.row_samples * size.num_microbatches, size.sample_tokens)
    rows = torch.randint(size.vocab_size, shape, generator=generator).tolist()
    mask = (False, *[True] * (size.sample_tokens - 1))
    return [Sample(sample_id=n, tokens=tuple(row), loss_mask=mask) for n, row in enumerate(rows)]


def open_mtrl(
    size: Size, way: Way, groups: ParallelGroups, *, like_everywhere: bool, lr: float = LR
) -> Opened:
    """mtrl's trainer. ``like_everywhere``: weights that are the same on every device, drawn on the host."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(size.hf_config()))
        config = load_model_config(Path(folder))
    is_fp8 = way.precision in ("fp8_blockwise", "fp8_delayed")
    model = build_model(
        config,
        groups,
        precision="fp32" if way.precision == "fp32" else "bf16",
        fp8=Fp8(recipe=cast(Any, way.precision)) if is_fp8 else None,
        backend=cast(Backend, way.side),
    )
    if like_everywhere:
        initialize(model, 1)
    else:
        draw(model.parameters().values())
    settings = OptimizerSection(lr=lr, grad_clip=CLIP, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
    trainer = Trainer(model, settings)
    trainer.start_phase(total_steps=1000, lr=lr, warmup_steps=0)
    batch = make_batch(size)
    microbatches = make_microbatches(batch, model, max_tokens=size.row_tokens, pad_token_id=0)
    assert len(microbatches) == size.num_microbatches
    return Opened(step=lambda: trainer.step(microbatches, SftLoss()).loss, trainer=trainer)


def draw(parameters: Any) -> None:
    """Norms 1, all else normal with deviation 0.02, on the device: billions are slow to draw on a host."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)


def open_transformers(size: Size, way: Way) -> Opened:
    """transformers' model with the arithmetic of a step of mtrl: masters and Adam's moments in fp32.

    Its gradients add up over microbatches in the weights' own dtype.
    """
    import transformers

    device = current_device().torch_device
    config = transformers.Qwen3MoeConfig(**size.hf_config())
    dtype = torch.float32 if way.precision == "fp32" else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).train()
    experts = "eager"
    if hasattr(model, "set_experts_implementation"):  # from 5.0 on
        experts = "grouped_mm"
        model.set_experts_implementation(experts)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    masters = weights if dtype == torch.float32 else [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=device.type == "cuda"
    )
    tokens = torch.tensor([sample.tokens for sample in make_batch(size)], device=device)
    rows = tokens.split(size.row_samples)
    num_trained = tokens.shape[0] * (size.sample_tokens - 1)

    def step() -> float:
        total = torch.zeros((), device=device)
        for row in rows:
            logits: Tensor = model(row, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), row[:, 1:].flatten(), reduction="sum"
            )
            loss = loss / num_trained
            loss.backward()
            total += loss.detach()
        _clip_and_update(weights, masters, optimizer)
        return float(total)

    return Opened(
        step=step, note=f"experts {experts}, attention sdpa, transformers {transformers.__version__}"
    )


def _clip_and_update(weights: list[Tensor], masters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(weights, CLIP)
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight:
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if masters is not weights:
        with torch.no_grad():
            torch._foreach_copy_([weight.data for weight in weights], masters)


def synchronise() -> None:
    """Wait for the device."""
    if current_device().kind == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, *, warm: int, at_least: int, at_most_s: float) -> tuple[list[float], list[float]]:
    """Seconds and losses of steps after ``warm`` uncounted ones: ``at_least`` so many, then while there is
    time. Losses are those of all steps.
    """
    seconds: list[float] = []
    losses: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < warm + at_least or time.perf_counter() - begin < at_most_s:
        synchronise()
        start = time.perf_counter()
        losses.append(step())
        synchronise()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= warm + 20:
            break
    return seconds[warm:], losses


def peak_bytes() -> int:
    """The most that tensors took on the device; on a CPU, what the process had resident at most."""
    if current_device().kind == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
