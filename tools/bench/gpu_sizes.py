"""A Qwen3-MoE that fills a GPU: its shape, its FLOPs, the memory of a step. Pure: imports no torch.

Legend of the formulas: F hidden size, H query heads, G KV heads, D head dim, E experts, K chosen experts, J
expert hidden size, L layers, S tokens of a sample.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from mtrl.parallel.errors import ConfigError

Side = Literal["torch_native", "transformer_engine", "transformers"]
PrecisionName = Literal["fp32", "bf16", "fp8_blockwise", "fp8_delayed"]
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
    (router). Besides, logits and their gradient (mtrl/logprobs.py) and one layer's K (4 F + 6 J) gradients,
    in the weights' dtype.
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
    per_token = size.num_layers * layer + 8 * hidden + 2 * itemsize * size.vocab_size + gradients
    adam = 0 if fused_adam else 4 * size.num_weights
    return per_weight * size.num_weights + max(size.row_tokens * per_token, adam)
