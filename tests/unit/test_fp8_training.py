"""Training through FP8 blocks learns what fp32 learns: two-digit addition, by a small Qwen3-MoE."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mtrl.models.backends.torch_native.fp8 import block_linear
from mtrl.models.precision import Fp8, GradientFormat
from tests.toys import build_toy

pytestmark = pytest.mark.one_stack

NUM_EXPERTS, VOCAB, PLUS, EQUALS = 4, 12, 10, 11
NUM_STEPS, NUM_LAST = 120, 20


class InBlocks(TorchFunctionMode):
    """Linears go through FP8, attention's and experts'; router and output layer not, as in DeepSeek-V3."""

    def __init__(self, gradients: GradientFormat) -> None:
        super().__init__()
        self.gradients, self.num_calls = gradients, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1].shape[0] not in (NUM_EXPERTS, VOCAB):
            self.num_calls += 1
            return block_linear(args[0], args[1], Fp8(gradients=self.gradients))
        return func(*args, **(kwargs or {}))


def additions(generator: torch.Generator) -> torch.Tensor:
    """Token ids of 64 sums such as 37+58=095, digit by digit."""
    a, b = torch.randint(0, 100, (2, 64), generator=generator)
    total = a + b
    digits = [a // 10, a % 10, torch.full_like(a, PLUS), b // 10, b % 10, torch.full_like(a, EQUALS)]
    return torch.stack([*digits, total // 100, total // 10 % 10, total % 10], dim=1)


def last_losses(gradients: GradientFormat | None) -> tuple[float, float]:
    """Mean loss of the first and of the last steps of SFT on the answers; None: in fp32."""
    sizes = dict(hidden_size=160, num_experts=NUM_EXPERTS, moe_intermediate_size=144, vocab_size=VOCAB)
    model = build_toy("moe", seed=1, initializer_range=0.04, experts_implementation="eager", **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    mode = InBlocks(gradients or "e4m3")
    losses = []
    for _ in range(NUM_STEPS):
        ids = additions(generator)
        if gradients is None:
            logits = model(ids).logits
        else:
            with mode:
                logits = model(ids).logits
        loss = F.cross_entropy(logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert gradients is None or mode.num_calls > 5 * NUM_STEPS
    return sum(losses[:5]) / 5, sum(losses[-NUM_LAST:]) / NUM_LAST


def test_sft_in_fp8_blocks_reaches_the_loss_of_fp32_within_2_percent() -> None:
    start, exact = last_losses(None)
    assert exact < 0.7 * start
    _, found = last_losses("e4m3")
    # Measured: 1.1 %; with gradients in e5m2 2.7 %, on a loss that still falls.
    assert abs(found - exact) <= 0.02 * exact
