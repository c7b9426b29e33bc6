import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtrl.losses import (
    compare_logprobs,
    join_comparisons,
    k3_kl,
    masked_sum,
    policy_loss,
    token_nll,
    truncated_importance_weights,
)

logprob_rows = st.lists(
    st.tuples(
        st.floats(-8, 0, width=32), st.floats(-8, 0, width=32), st.floats(-3, 3, width=32), st.booleans()
    ),
    min_size=1,
    max_size=20,
)
Row = list[tuple[float, float, float, bool]]


def columns(rows: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, old, advantages, mask = zip(*rows, strict=True)
    return (
        torch.tensor(new).double(),
        torch.tensor(old).double(),
        torch.tensor(advantages).double(),
        torch.tensor(mask),
    )


def ppo_token_by_hand(new: float, old: float, advantage: float, low: float, high: float) -> float:
    ratio = math.exp(new - old)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@given(rows=logprob_rows, low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_policy_loss_is_the_sum_of_the_formula_over_trained_tokens(
    rows: Row, low: float, high: float
) -> None:
    new, old, advantages, mask = columns(rows)
    loss = policy_loss(new, old, advantages, mask, clip_low=low, clip_high=high)
    expected = [ppo_token_by_hand(n, o, a, low, high) for n, o, a, trained in rows if trained]
    assert loss.loss_sum.item() == pytest.approx(math.fsum(expected), rel=1e-9, abs=1e-9)
    assert loss.num_tokens.item() == len(expected)
    assert loss.old_kl_sum.item() >= 0.0


@given(rows=logprob_rows, cut=st.integers(0, 20))
def test_sums_of_parts_add_up_to_the_sum_of_the_whole(rows: Row, cut: int) -> None:
    whole = columns(rows)
    parts = [columns(part) for part in (rows[:cut], rows[cut:]) if part]
    whole_loss = policy_loss(*whole)
    part_losses = [policy_loss(*part) for part in parts]
    for name in ("loss_sum", "num_tokens", "num_clipped", "old_kl_sum"):
        total = sum(getattr(part, name).item() for part in part_losses)
        assert total == pytest.approx(getattr(whole_loss, name).item(), rel=1e-9, abs=1e-9)


@given(rows=logprob_rows)
def test_on_policy_the_gradient_is_minus_the_advantage(rows: Row) -> None:
    new, _, advantages, mask = columns(rows)
    logprobs = new.clone().requires_grad_()
    loss = policy_loss(logprobs, new, advantages, mask)
    torch.autograd.backward(loss.loss_sum)
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages, 0.0))
    assert loss.num_clipped.item() == 0 and loss.old_kl_sum.item() == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.5, 1.0, True),
        (1.5, -1.0, False),
        (0.5, -1.0, True),
        (0.5, 1.0, False),
        (1.25, 1.0, False),
        (0.85, -1.0, True),
    ],
)
def test_the_clip_stops_the_gradient_only_where_it_would_go_further(
    ratio: float, advantage: float, clipped: bool
) -> None:
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    old, mask = torch.zeros(1), torch.tensor([True])
    loss = policy_loss(logprob, old, torch.tensor([advantage]), mask, clip_low=0.1, clip_high=0.3)
    torch.autograd.backward(loss.loss_sum)
    assert logprob.grad is not None
    assert (logprob.grad.item() == 0.0) is clipped
    assert loss.num_clipped.item() == int(clipped)


def test_masked_out_tokens_touch_neither_values_nor_gradients() -> None:
    bad = torch.tensor([-1.0, math.nan, math.inf, -math.inf, 300.0])
    mask = torch.tensor([True, False, False, False, False])
    logprobs = bad.clone().requires_grad_()
    sampler = torch.tensor([-1.5, math.nan, -math.inf, 0.0, -300.0])
    loss = policy_loss(logprobs, sampler, bad, mask, weights_T=bad.abs())
    total = loss.loss_sum + k3_kl(logprobs, sampler, mask).sum() + masked_sum(logprobs, mask)
    torch.autograd.backward(total)
    assert logprobs.grad is not None
    assert torch.isfinite(total) and torch.isfinite(logprobs.grad).all()
    assert logprobs.grad[1:].tolist() == [0.0] * 4 and logprobs.grad[0] != 0.0
    assert compare_logprobs(sampler, bad, mask).abs_diff_max.item() == 0.5
    assert truncated_importance_weights(bad, sampler, mask, cap=9.0)[1:].tolist() == [1.0] * 4


def test_weights_multiply_the_loss_of_each_token_and_carry_no_gradient() -> None:
    new, old, advantages, mask = columns([(-1.0, -1.1, 1.0, True), (-2.0, -2.0, -1.0, True)])
    weights = torch.tensor([0.5, 2.0]).double().requires_grad_()
    new.requires_grad_()
    weighted = policy_loss(new, old, advantages, mask, weights_T=weights)
    torch.autograd.backward(weighted.loss_sum)
    assert weighted.loss_sum.item() == pytest.approx(-0.5 * math.exp(0.1) + 2.0)
    assert weights.grad is None


@given(
    trainer=st.lists(st.floats(-8, 0, width=32), min_size=1, max_size=9),
    cap=st.floats(1.0, 4.0),
    shift=st.floats(-3, 3),
)
def test_importance_weights_are_the_ratio_up_to_the_cap(
    trainer: list[float], cap: float, shift: float
) -> None:
    trainer_T = torch.tensor(trainer).double()
    weights = truncated_importance_weights(
        trainer_T, trainer_T - shift, torch.ones(len(trainer)).bool(), cap=cap
    )
    assert weights.tolist() == pytest.approx([min(math.exp(shift), cap)] * len(trainer), rel=1e-9)


def test_token_nll_is_minus_the_log_softmax_at_the_target() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 6, 3, 3, 1])
    expected = -logits.log_softmax(-1)[torch.arange(5), targets]
    # float32 rounding of numbers up to about 5.
    torch.testing.assert_close(token_nll(logits, targets), expected, rtol=0, atol=1e-6)
    assert token_nll(logits.bfloat16(), targets).dtype == torch.float32


def test_k3_averages_to_the_true_kl_and_its_gradient_vanishes_where_policies_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    true_kl = (policy.exp() * (policy - reference)).sum()
    # The expectation over the policy, exactly: each token weighted by its probability.
    expectation = (policy.exp() * k3_kl(policy, reference, torch.ones(6).bool())).sum()
    assert expectation.item() == pytest.approx(true_kl.item(), rel=1e-9)
    same = policy.clone().requires_grad_()
    torch.autograd.backward(k3_kl(same, policy, torch.ones(6).bool()).sum())
    assert same.grad is not None and same.grad.abs().max().item() == 0.0


def test_comparing_counts_what_is_beyond_and_sees_a_nan() -> None:
    sampler = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    trainer = sampler + torch.tensor([0.0, 5e-6, -1e-3, 7.0])
    mask = torch.tensor([True, True, True, False])
    seen = compare_logprobs(sampler, trainer, mask)
    # Differences of float32 numbers near 3 are known to 2.4e-7.
    assert seen.abs_diff_max.item() == pytest.approx(1e-3, abs=3e-7)
    assert (seen.num_beyond.item(), seen.num_tokens.item()) == (1.0, 3.0)
    assert seen.k3_sum.item() == pytest.approx(0.5e-6, rel=1e-2)
    broken = compare_logprobs(sampler, torch.tensor([-1.0, math.nan, -3.0, -4.0]), mask)
    assert math.isnan(broken.abs_diff_max.item()) and broken.num_beyond.item() == 1.0


def test_k3_of_differences_as_small_as_rounding_is_not_rounding() -> None:
    sampler = torch.full((1000,), -1.0)
    seen = compare_logprobs(sampler, torch.full((1000,), -1.0 + 2**-20), torch.ones(1000).bool())
    assert seen.k3_sum.item() == pytest.approx(1000 * 2**-41, rel=1e-3)


@given(rows=logprob_rows, cut=st.integers(0, 20))
def test_joined_comparisons_are_the_comparison_of_the_whole(rows: Row, cut: int) -> None:
    parts = [columns(part) for part in (rows[:cut], rows[cut:]) if part]
    joined = join_comparisons(compare_logprobs(new, old, mask) for new, old, _, mask in parts)
    new, old, _, mask = columns(rows)
    whole = compare_logprobs(new, old, mask)
    for name in whole.__slots__:
        assert getattr(joined, name).item() == pytest.approx(getattr(whole, name).item(), rel=1e-9, abs=1e-12)
