"""Experts as stacked weights and grouped matrix products.

Legend: T tokens, E local experts, F hidden size, J expert hidden size on this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mtrl.parallel.megatron_ready  # noqa: F401
from mtrl.models.backends.torch_native.fp8 import block_linear
from mtrl.models.config import ModelConfig
from mtrl.models.precision import Fp8

from megatron.core.transformer.transformer_config import TransformerConfig

_CLAMP, _SIGMOID_SLOPE = 7.0, 1.702  # gpt-oss's modelling code


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The hidden activation of an expert from its two projections."""
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
        return gate * torch.sigmoid(gate * _SIGMOID_SLOPE) * (up + 1)
    return F.silu(gate) * up


class GroupedExperts(nn.Module):
    """Gated experts of this rank as two stacked weights and two grouped matrix products.

    Tokens come sorted by expert from Megatron's dispatcher, which also gathers them over ``ffn.etp``
    before and reduce-scatters after, so nothing here communicates. ``weight1`` is [E, 2*J, F] (gate,
    then up), ``weight2`` is [E, F, J]: the layout of most checkpoints, so that loading rarely transposes.
    Biases, where the model has them: ``bias1`` [E * 2*J] and ``bias2`` [E * F].
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, *,
        model: ModelConfig, fp8: Fp8 | None = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.etp = pg_collection.expt_tp.size()
        hidden, expert_hidden = config.hidden_size, config.moe_ffn_hidden_size // self.etp
        self.num_local_experts, self.activation = num_local_experts, model.activation
        self.fp8 = fp8
        is_folded = pg_collection.ep.size() > 1 or self.etp != config.tensor_model_parallel_size

        def parameter(*shape: int, sharded_dim: int | None) -> nn.Parameter:
            made = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            # Megatron's marks: which groups reduce the gradient, and whether etp ranks hold distinct parts.
            made.allreduce = not is_folded  # type: ignore[attr-defined]
            if sharded_dim is not None:
                made.tensor_model_parallel = True  # type: ignore[attr-defined]
                made.partition_dim, made.partition_stride = sharded_dim, 1  # type: ignore[attr-defined]
            return made

        num = num_local_experts
        self.weight1 = parameter(num, 2 * expert_hidden, hidden, sharded_dim=1)
        self.weight2 = parameter(num, hidden, expert_hidden, sharded_dim=2)
        # One dim: Megatron's optimizer spares parameters of one dim, norms and biases, from weight decay.
        self.bias1 = parameter(num * 2 * expert_hidden, sharded_dim=0) if model.linear_bias else None
        self.bias2 = parameter(num * hidden, sharded_dim=None) if model.linear_bias else None

    def forward(
        self, x_TF: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply expert e to its tokens and scale by the router's probability.

        Args:
            x_TF: tokens sorted by expert.
            tokens_per_expert: [E] integers that sum to T.
            probs_T: the probability with which each token chose its expert.

        Returns:
            The output [T, F] and no bias.
        """
        counts_E = torch.as_tensor(tokens_per_expert, device=x_TF.device)
        gate_up = self._product(x_TF, self.weight1, counts_E)
        if self.bias1 is not None:
            gate_up = gate_up + self.bias1.view(len(counts_E), -1).repeat_interleave(counts_E, dim=0)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = gated(gate, up, self.activation) * probs_T.unsqueeze(-1)
        output = self._product(hidden.to(x_TF.dtype), self.weight2, counts_E)
        if self.bias2 is not None:
            bias_EF = self._shared_bias(self.bias2).view(len(counts_E), -1)
            bias_TF = bias_EF.repeat_interleave(counts_E, dim=0)
            output = output + (bias_TF * probs_T.unsqueeze(-1)).to(output.dtype)
        return output, None

    def _product(self, x_TF: torch.Tensor, weight_EOF: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        if self.fp8 is None:
            return grouped_linear(x_TF, weight_EOF, counts_E)
        # One by one: the tokens of a call share blocks in the weight's gradient.
        parts = zip(x_TF.split(counts_E.tolist()), weight_EOF, strict=True)
        return torch.cat([block_linear(part, weight, self.fp8) for part, weight in parts])

    def _shared_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """This rank's part of a bias that the sum over etp adds up again.

        The value is divided, the gradient is not: each etp rank holds the whole bias and sees the whole
        gradient of the sum, so its copies stay alike.
        """
        if self.etp == 1:
            return bias
        share: torch.Tensor = bias / self.etp + (bias - bias.detach()) * (1 - 1 / self.etp)
        return share


def grouped_linear(x_TF: torch.Tensor, weight_EOF: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """``x @ weight[e].T`` for the tokens of each expert e, which lie together in ``x_TF``.

    torch's grouped product takes only rows that are a multiple of 16 bytes long, of fp32 or bf16, and on a
    GPU only of bf16; everything else goes expert by expert.
    """
    row_bytes = [size * x_TF.element_size() for size in weight_EOF.shape[1:]]
    is_typed = x_TF.dtype == torch.bfloat16 or (x_TF.dtype == torch.float32 and not x_TF.is_cuda)
    if not is_typed or any(num_bytes % 16 for num_bytes in row_bytes):
        parts = x_TF.split(counts_E.tolist())
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOF, strict=True)])
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_TF, weight_EOF.transpose(1, 2), offs=ends_E)
