"""What a step minimises, on microbatches of plain tensors."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mtrl.batch import Sample
from mtrl.config import AlgorithmSection
from mtrl.objectives import GrpoLoss, SftLoss
from mtrl.packing import pack
from mtrl.policy import Microbatch

SETTINGS = AlgorithmSection(name="grpo", total_steps=1, max_tokens_per_microbatch=64)


def microbatch(advantages: tuple[float, float] = (1.0, -0.5), **filled: Tensor) -> Microbatch:
    """Two samples of which 2 and 3 tokens are trained on, padded to 16."""
    samples = [
        Sample(
            sample_id=n,
            tokens=tuple(range(2, 6 + n)),
            loss_mask=(False, False) + (True,) * (2 + n),
            sampler_logprobs=(0.0, 0.0) + (-1.0,) * (2 + n),
            advantage=advantage,
        )
        for n, advantage in enumerate(advantages)
    ]
    packed = pack(samples, pad_to=16, pad_token_id=0)
    return dataclasses.replace(Microbatch.on_device(packed), **filled)


def logprobs(*, start: float = -1.0, step: float = 0.0) -> Tensor:
    return (start + step * torch.arange(16.0)).requires_grad_()


def test_sft_minimises_minus_the_log_likelihood_of_trained_tokens() -> None:
    logprobs_T = logprobs(start=-1.0, step=-0.25)
    batch = microbatch()
    loss, sums = SftLoss()(logprobs_T, batch)
    loss.backward()
    mask_T = batch.packed.loss_mask_T
    assert float(loss.detach()) == pytest.approx(-float(logprobs_T.detach()[mask_T].sum())) and sums == {}
    assert torch.equal(logprobs_T.grad, torch.where(mask_T, -1.0, 0.0))


def test_a_policy_that_has_not_moved_gets_the_policy_gradient() -> None:
    logprobs_T, batch = logprobs(), microbatch()
    loss, _ = GrpoLoss(SETTINGS)(logprobs_T, batch)
    loss.backward()
    advantages_T = torch.where(batch.packed.loss_mask_T, batch.packed.advantages_T, 0.0)
    assert float(loss.detach()) == pytest.approx(-float(advantages_T.sum()))
    assert torch.allclose(logprobs_T.grad, -advantages_T)


def test_old_logprobs_make_the_ratio_and_the_clip_bounds_it() -> None:
    batch = microbatch(advantages=(1.0, 1.0), old_logprobs_T=torch.full((16,), -2.0))
    logprobs_T = logprobs(start=-1.0)
    loss, sums = GrpoLoss(SETTINGS)(logprobs_T, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-5 * 1.2) and float(sums["num_clipped"]) == 5
    assert not logprobs_T.grad.any()


def test_the_reference_adds_its_kl_times_the_coefficient() -> None:
    settings = dataclasses.replace(SETTINGS, kl_coef=0.5)
    batch = microbatch(advantages=(0.0, 0.0), ref_logprobs_T=torch.full((16,), -2.0))
    loss, sums = GrpoLoss(settings)(logprobs(), batch)
    k3 = 5 * (torch.tensor(-1.0).exp() - 1 + 1)
    assert float(sums["ref_kl_sum"]) == pytest.approx(float(k3))
    assert float(loss.detach()) == pytest.approx(0.5 * float(k3))


def test_without_a_reference_there_is_no_kl() -> None:
    _, sums = GrpoLoss(SETTINGS)(logprobs(), microbatch())
    assert float(sums["ref_kl_sum"]) == 0.0


def test_the_correction_weighs_tokens_by_trainer_over_sampler_up_to_its_cap() -> None:
    batch = microbatch(advantages=(1.0, 1.0))
    nearer, _ = GrpoLoss(dataclasses.replace(SETTINGS, sampler_correction=2.0))(logprobs(start=-1.5), batch)
    capped, _ = GrpoLoss(dataclasses.replace(SETTINGS, sampler_correction=2.0))(logprobs(start=0.0), batch)
    assert float(nearer.detach()) == pytest.approx(-5 * float(torch.tensor(-0.5).exp()))
    assert float(capped.detach()) == pytest.approx(-5 * 2.0)


def test_the_mismatch_compares_the_sampler_with_the_policy_before_the_update() -> None:
    old_T = torch.full((16,), -1.0)
    old_T[microbatch().packed.loss_mask_T.nonzero()[0]] = -1.5
    _, sums = GrpoLoss(SETTINGS)(logprobs(start=-7.0), microbatch(old_logprobs_T=old_T))
    assert float(sums["abs_diff_max"]) == pytest.approx(0.5) and float(sums["num_beyond"]) == 1
    assert float(sums["k3_sum"]) == pytest.approx(float(torch.tensor(-0.5).exp()) - 1 + 0.5)


def test_what_is_not_trained_on_changes_nothing() -> None:
    batch = microbatch()
    mask_T = batch.packed.loss_mask_T
    for loss in (GrpoLoss(SETTINGS), SftLoss()):
        clean, _ = loss(logprobs(), batch)
        spoiled_T = torch.where(mask_T, logprobs().detach(), torch.nan).requires_grad_()
        spoiled, _ = loss(spoiled_T, batch)
        spoiled.backward()
        assert float(spoiled.detach()) == float(clean.detach()) and bool(torch.isfinite(spoiled_T.grad).all())


@pytest.mark.parametrize("loss", [GrpoLoss(SETTINGS), SftLoss()], ids=["grpo", "sft"])
def test_a_loss_reports_exactly_the_sums_it_names(loss: GrpoLoss | SftLoss) -> None:
    value, sums = loss(logprobs(), microbatch())
    assert set(sums) == set(loss.names)
    assert not any(each.requires_grad for each in sums.values()) and value.requires_grad
