"""What a step minimises: SFT's negative log-likelihood and GRPO's clipped policy gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtrl.config import AlgorithmSection
from mtrl.losses import compare_logprobs, k3_kl, masked_sum, policy_loss, truncated_importance_weights
from mtrl.policy import Microbatch, Sums


@dataclass(frozen=True, slots=True)
class SftLoss:
    """-log p of every trained token."""

    names: ClassVar[tuple[str, ...]] = ()

    def __call__(self, logprobs_T: Tensor, microbatch: Microbatch) -> tuple[Tensor, Sums]:
        """See ``policy.Loss``."""
        return -masked_sum(logprobs_T, microbatch.packed.loss_mask_T), {}


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """GRPO (arXiv 2402.03300) with a token-level mean, clipping, and an optional KL penalty.

    Where a microbatch has no ``old_logprobs_T`` the policy has not moved since it sampled, and its own
    log-probabilities are the old ones: the ratio is 1 and its gradient the policy gradient's.
    """

    settings: AlgorithmSection

    names: ClassVar[tuple[str, ...]] = (
        "num_clipped",
        "ref_kl_sum",
        "k3_sum",
        "num_beyond",
        "abs_diff_max",
    )

    def __call__(self, logprobs_T: Tensor, microbatch: Microbatch) -> tuple[Tensor, Sums]:
        """See ``policy.Loss``."""
        settings, packed = self.settings, microbatch.packed
        mask_T, sampler_T = packed.loss_mask_T, packed.sampler_logprobs_T
        old_T = logprobs_T.detach() if microbatch.old_logprobs_T is None else microbatch.old_logprobs_T
        weights_T = None
        if settings.sampler_correction:
            cap = settings.sampler_correction
            weights_T = truncated_importance_weights(old_T, sampler_T, mask_T, cap=cap)
        clipped = policy_loss(
            logprobs_T,
            old_T,
            packed.advantages_T,
            mask_T,
            clip_low=settings.clip_eps_low,
            clip_high=settings.clip_eps_high,
            weights_T=weights_T,
        )
        loss_sum, ref_kl_sum = clipped.loss_sum, torch.zeros_like(clipped.loss_sum)
        if microbatch.ref_logprobs_T is not None:
            ref_kl_sum = k3_kl(logprobs_T, microbatch.ref_logprobs_T, mask_T).sum()
            loss_sum = loss_sum + settings.kl_coef * ref_kl_sum
        mismatch = compare_logprobs(sampler_T, old_T, mask_T)
        return loss_sum, {
            "num_clipped": clipped.num_clipped,
            "ref_kl_sum": ref_kl_sum.detach(),
            "k3_sum": mismatch.k3_sum,
            "num_beyond": mismatch.num_beyond,
            "abs_diff_max": mismatch.abs_diff_max,
        }
