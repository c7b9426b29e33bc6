"""The router: Megatron-Core's choice of experts, with auxiliary losses that no layout or padding changes.

Megatron's own losses cannot be used over packed rows. Their gradient is scaled by the count of all tokens
and divided by that of trained ones (``router.py`` of 0.16.1, 457-466). Without a padding mask 0.16 makes it
smaller by tp * cp; with one 0.19 makes it larger by as much, for its sum over ranks changes its own summand
in place (``moe_utils.py``, ``get_tokens_per_expert_and_token_count``). A row of padding alone divides 0 by 0.
The count for the selection bias fails beside a mask (``_apply_expert_bias``), and later pipeline stages do
not split the mask over sequence parallel ranks (``gpt_model.py``, ``_preprocess``). The loss over a step
takes shares from the microbatches so far, the one over sequences takes a packed row for one.
``tests/distributed/test_megatron_router_defects.py`` shows the first ones.

With N real tokens in an optimizer step, over all microbatches and ranks, each router adds to the step's loss

    z_loss_coeff    * 1/N sum over tokens of logsumexp(logits)^2               (arXiv 2202.08906)
    aux_loss_coeff  * 1/N sum over groups g of n_g A_g                         (arXiv 2101.03961)
    A_g = E sum over experts of f_ge P_ge

with n_g tokens in group g, f_ge the share of their choices that fall on expert e and P_ge the mean of its
score (softmax, or sigmoid over its sum). As in Megatron and DeepSeek-V3, f counts the highest scores, without
selection bias or limits by group of experts. A group is one microbatch's row, one sample, or the whole step.

Legend: T this rank's tokens of a microbatch, E experts, G groups of tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mtrl.parallel.megatron_ready  # noqa: F401
from mtrl.parallel.device import current_device

from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter

AuxLoss = Literal["none", "microbatch", "sequence", "global_batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLosses:
    """Which losses routers add; see the top of the file."""

    aux_loss: AuxLoss = "none"
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """Means over the routers of a model and the real tokens of a step, before their coefficients.

    ``aux_loss`` is 1 where every expert gets the same; None: not asked for.
    """

    aux_loss: float | None
    z_loss: float | None


@dataclass(slots=True, kw_only=True)
class _Pass:
    """What all routers of a rank share while a schedule runs.

    ``count``: only count choices, without gradient. ``num_tokens`` are the real, ``num_trained`` the trained
    tokens of the step, over all ranks; the trainer divides gradients by the second.
    """

    losses: RouterLosses
    mode: Literal["off", "count", "train"] = "off"
    num_tokens: float = 1.0
    num_trained: float = 0.0


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router; ``padding_mask`` is the membership of tokens in groups, bool [T, 1, G].

    A token in no group is padding. Without membership nothing is counted and no loss is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = _Pass(losses=RouterLosses())
        self.clear()

    def clear(self) -> None:
        """Forget what a step has summed."""
        device = current_device().torch_device
        self.counts_E = torch.zeros(self.config.num_moe_experts, device=device)
        self.aux_sum, self.z_sum = (torch.zeros((), device=device) for _ in range(2))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts, attach the losses, count for the bias. Collective over tp x cp."""
        shared, losses = self.shared, self.shared.losses
        is_training = shared.mode == "train" and torch.is_grad_enabled()
        if padding_mask is None or not (is_training or shared.mode == "count"):
            return super().routing(logits)  # type: ignore[no-any-return]
        groups_TG = padding_mask.flatten(0, 1)
        if shared.mode == "count":
            chosen_TE, _ = self._scores(logits)
            self.counts_E += (chosen_TE * groups_TG).sum(0)
            return super().routing(logits)  # type: ignore[no-any-return]
        if losses.z_loss_coeff:
            logits = self._with_z_loss(logits, groups_TG)
        probs_TE, map_TE = super().routing(logits)
        if losses.aux_loss != "none":
            probs_TE = self._with_aux_loss(probs_TE, logits, groups_TG)
        if self.enable_expert_bias:
            self.local_tokens_per_expert += (map_TE & groups_TG.any(1, keepdim=True)).sum(0)
        return probs_TE, map_TE

    def _apply_expert_bias(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's count for the selection bias, which would count padding: see ``routing``."""

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        flat_TE = logits.view(-1, self.config.num_moe_experts)
        chosen_TE, scores_TE = compute_routing_scores_for_aux_loss(flat_TE, self.topk, self.score_function)
        return chosen_TE, scores_TE

    def _with_z_loss(self, logits: Tensor, groups_TG: Tensor) -> Tensor:
        squares_T = logits.view(-1, self.config.num_moe_experts).logsumexp(-1).square()
        total = (squares_T * groups_TG.any(1)).sum()
        self.z_sum += total.detach()
        return self._attached(logits, self.shared.losses.z_loss_coeff * total)

    def _with_aux_loss(self, probs_TE: Tensor, logits: Tensor, groups_TG: Tensor) -> Tensor:
        """Attach this rank's share of the sum of n A: scores are its own tokens', counts all's."""
        chosen_TE, scores_TE = self._scores(logits)
        members_GT = groups_TG.T.to(scores_TE.dtype)
        if self.shared.losses.aux_loss == "global_batch":
            counts_GE = self.counts_E[None]
            num_tokens_G = counts_GE.new_full((1,), self.shared.num_tokens)
        else:
            counted = torch.cat(
                (members_GT @ chosen_TE.to(members_GT.dtype), members_GT.sum(1, keepdim=True)), 1
            )
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(counted, group=self.tp_cp_group)
            counts_GE, num_tokens_G = counted[:, :-1], counted[:, -1].clamp(min=1.0)
        sums_G = (counts_GE * (members_GT @ scores_TE)).sum(1)
        total = (sums_G / num_tokens_G).sum() * (self.config.num_moe_experts / self.topk)
        self.aux_sum += total.detach()
        return self._attached(probs_TE, self.shared.losses.aux_loss_coeff * total)

    def _attached(self, activation: Tensor, total: Tensor) -> Tensor:
        """``activation``, whose backward adds the gradient of ``total`` / num_tokens to the step's loss."""
        # The trainer divides all gradients by num_trained.
        scale = self.shared.num_trained / self.shared.num_tokens
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, total * scale)
        return attached


class Routers:
    """All routers of a rank's model: their losses, the update of their selection bias, freezing."""

    def __init__(
        self, chunks: Sequence[nn.Module], losses: RouterLosses | None = None, *, updates_bias: bool = False
    ) -> None:
        self.all = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Router)]
        self._shared = _Pass(losses=losses or RouterLosses())
        for router in self.all:
            router.shared = self._shared
        self.losses = self._shared.losses
        self.are_watched = self.losses != RouterLosses() or updates_bias
        """Whether a step must tell routers which tokens are real."""

    def freeze(self) -> None:
        """Take the routers' weights out of training; before DDP wraps the model."""
        for router in self.all:
            for parameter in router.parameters():
                parameter.requires_grad_(False)

    def biases(self) -> list[Tensor]:
        """Copies of the selection biases, for ``restore``."""
        return [router.expert_bias.clone() for router in self.all if router.expert_bias is not None]

    def restore(self, biases: Sequence[Tensor]) -> None:
        """Put selection biases back."""
        with_bias = [router for router in self.all if router.expert_bias is not None]
        for router, bias in zip(with_bias, biases, strict=True):
            router.expert_bias.copy_(bias)

    def membership(self, sample_T: Tensor, num_samples: int) -> Tensor | None:
        """What routers take as ``padding_mask`` of a microbatch, bool [1, T, G]; None while none is at work.

        ``sample_T`` is the sample of each of this rank's tokens, -1 for padding.
        """
        if self._shared.mode == "off":
            return None
        if self.losses.aux_loss != "sequence":
            return (sample_T >= 0)[None, :, None]
        samples = torch.arange(max(num_samples, 1), device=sample_T.device)
        return (sample_T[:, None] == samples)[None]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the step's choices of all ranks, for ``global_batch``. Collective over tp x dp x cp."""
        for router in self.all:
            router.clear()
        self._shared.mode = "count"
        try:
            yield
        finally:
            self._shared.mode = "off"
        for router in self.all:
            dist.all_reduce(router.counts_E, group=router.tp_dp_cp_group)

    @contextmanager
    def training(self, *, num_tokens: float, num_trained: float) -> Iterator[None]:
        """Add losses and count for the selection bias; the numbers are ``_Pass``'s."""
        for router in self.all:
            router.aux_sum.zero_()
            router.z_sum.zero_()
        self._shared.num_tokens, self._shared.num_trained = max(num_tokens, 1.0), num_trained
        self._shared.mode = "train"
        try:
            yield
        finally:
            self._shared.mode = "off"

    def report(self) -> RouterReport:
        """What the last step's losses were. Collective over WORLD."""
        local = [sum(float(getattr(r, name)) for r in self.all) for name in ("aux_sum", "z_sum")]
        # All ranks of tp x dp x cp hold the same router.
        copies = [sum(1.0 / r.tp_dp_cp_group.size() for r in self.all)]
        sums = torch.tensor([*local, *copies], dtype=torch.float64, device=current_device().torch_device)
        dist.all_reduce(sums)
        aux, z, num_routers = sums.tolist()
        total = max(num_routers, 1.0) * self._shared.num_tokens
        return RouterReport(
            aux_loss=aux / total if self.losses.aux_loss != "none" else None,
            z_loss=z / total if self.losses.z_loss_coeff else None,
        )
