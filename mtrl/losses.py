"""Losses and log-probability comparisons as functions of tensors; sums, never means.

The trainer divides by the token count of the whole global batch, which no rank knows here. Log-probabilities
are natural logs. Masked positions may hold anything, NaN included: they touch neither values nor gradients.

Suffixes: T is the tokens of a packed microbatch, V the vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Sampler and trainer in float32 agree to 1e-6 where they route tokens to the same experts; a token beyond
# this differs for a reason other than the order of additions.
LOGPROB_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyLoss:
    """Sums over the trained tokens, 0-d tensors; only ``loss_sum`` carries a gradient."""

    loss_sum: Tensor
    num_tokens: Tensor
    num_clipped: Tensor
    """Tokens whose ratio is outside the bounds on the side that the clip acts on."""
    old_kl_sum: Tensor
    """k3 estimate of KL(old policy, policy): how far the update has moved."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogprobComparison:
    """Sampler against trainer, same weights; 0-d float64 tensors. The first joins by max, the rest by sum."""

    abs_diff_max: Tensor
    k3_sum: Tensor
    num_beyond: Tensor
    num_tokens: Tensor


def token_nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return -log p(target), float32, per token; for logits whose vocabulary is whole on this rank."""
    return functional.cross_entropy(logits_TV.float(), targets_T, reduction="none")


def masked_sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return the sum over masked-in tokens; what is masked out does not count even if it is NaN."""
    return torch.where(mask_T, values_T, torch.zeros_like(values_T)).sum()


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights_T: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy gradient: the sum of -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A).

    The clip is PPO's (arXiv 1707.06347, eq. 7); different bounds below and above are DAPO's (arXiv
    2503.14476, section 3.1). ``mask_T`` is bool. ``weights_T``, no gradient, multiplies each token's loss;
    see `truncated_importance_weights`.
    """
    log_ratio_T = _difference(logprobs_T, old_logprobs_T.detach(), mask_T)
    advantages_T = torch.where(mask_T, advantages_T, torch.zeros_like(advantages_T))
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped_loss_T, clipped_loss_T = -ratio_T * advantages_T, -clipped_T * advantages_T
    loss_T = torch.maximum(unclipped_loss_T, clipped_loss_T)
    if weights_T is not None:
        loss_T = loss_T * torch.where(mask_T, weights_T.detach(), torch.zeros_like(loss_T))
    with torch.no_grad():
        num_clipped = (mask_T & (clipped_loss_T > unclipped_loss_T)).sum()
        old_kl_sum = _k3(log_ratio_T).sum()
    return PolicyLoss(
        loss_sum=loss_T.sum(), num_tokens=mask_T.sum(), num_clipped=num_clipped, old_kl_sum=old_kl_sum
    )


def truncated_importance_weights(
    trainer_logprobs_T: Tensor, sampler_logprobs_T: Tensor, mask_T: Tensor, *, cap: float
) -> Tensor:
    """Return min(p_trainer / p_sampler, cap) per token, without gradient, 1.0 where masked out.

    Corrects for a sampler that draws from slightly other probabilities than the trainer computes; the cap
    bounds the variance (Ionides 2008, "Truncated importance sampling"; for RL with a separate sampler: Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return _difference(trainer_logprobs_T, sampler_logprobs_T, mask_T).detach().exp().clamp(max=cap)


def k3_kl(logprobs_T: Tensor, ref_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy, reference) per token, 0.0 where masked out; carries a gradient.

    r - 1 - log r with r = p_ref / p: unbiased for tokens drawn from the policy, never negative (J. Schulman,
    "Approximating KL divergence", 2020).
    """
    return _k3(_difference(ref_logprobs_T.detach(), logprobs_T, mask_T))


@torch.no_grad()
def compare_logprobs(
    sampler_logprobs_T: Tensor,
    trainer_logprobs_T: Tensor,
    mask_T: Tensor,
    *,
    tolerance: float = LOGPROB_TOLERANCE,
) -> LogprobComparison:
    """Compare what the sampler said of the tokens it drew with what the trainer says of them.

    ``k3_sum`` sums the k3 estimate of KL(sampler, trainer). A NaN makes ``abs_diff_max`` NaN and is beyond.
    """
    # float64: k3 is about half the squared difference, which float32 would lose in rounding at 1e-6.
    difference_T = _difference(trainer_logprobs_T.double(), sampler_logprobs_T.double(), mask_T)
    abs_diff_T = difference_T.abs()
    zero = abs_diff_T.new_zeros(())
    return LogprobComparison(
        abs_diff_max=torch.cat([abs_diff_T.flatten(), zero[None]]).max(),
        k3_sum=_k3(difference_T).sum(),
        num_beyond=(~(abs_diff_T <= tolerance)).sum().double(),
        num_tokens=mask_T.sum().double(),
    )


def join_comparisons(parts: Iterable[LogprobComparison]) -> LogprobComparison:
    """Return the comparison of all tokens from those of at least one microbatch."""
    parts = tuple(parts)
    return LogprobComparison(
        abs_diff_max=torch.stack([part.abs_diff_max for part in parts]).max(),
        k3_sum=torch.stack([part.k3_sum for part in parts]).sum(),
        num_beyond=torch.stack([part.num_beyond for part in parts]).sum(),
        num_tokens=torch.stack([part.num_tokens for part in parts]).sum(),
    )


def _difference(left_T: Tensor, right_T: Tensor, mask_T: Tensor) -> Tensor:
    # Before exp(), not after: exp of a masked-out infinity would make the gradient 0 * inf = NaN.
    zero_T = torch.zeros_like(left_T)
    return torch.where(mask_T, left_T, zero_T) - torch.where(mask_T, right_T, zero_T)


def _k3(log_ratio_T: Tensor) -> Tensor:
    # expm1 keeps the digits that exp(x) - 1 loses where x is small.
    return torch.expm1(log_ratio_T) - log_ratio_T
