"""The parts of the RL loop that are plain functions."""

import pytest

from mtrl.batch import Completion, Prompt
from mtrl.data.order import DataCursor
from mtrl.metrics import StepMetrics, StepSeconds, Stopwatch
from mtrl.parallel.errors import MismatchError
from mtrl.rl import check_mismatch, next_prompts, step_metrics, to_samples
from mtrl.trainer import StepResult

PROMPTS = [Prompt(prompt_id=n, tokens=(1, 10 + n), text=str(n), answer="") for n in range(5)]


def completion(prompt_id: int, index: int, tokens: tuple[int, ...], *, stopped: bool = True) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        sample_index=index,
        tokens=tokens,
        logprobs=tuple(-0.5 * n for n in range(len(tokens))),
        finish_reason="stop" if stopped else "length",
        policy_version=7,
        text="",
    )


def test_an_epoch_shows_every_prompt_once() -> None:
    cursor, seen = DataCursor(num_records=5, seed=1), []
    for _ in range(5):
        prompts, cursor = next_prompts(PROMPTS, cursor, 2)
        seen += [prompt.tokens for prompt in prompts]
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(prompt.tokens for prompt in PROMPTS)


def test_a_prompt_that_comes_again_has_another_id_and_so_other_seeds() -> None:
    cursor, ids = DataCursor(num_records=5, seed=1), []
    for count in (3, 9, 1, 2):
        prompts, cursor = next_prompts(PROMPTS, cursor, count)
        ids += [prompt.prompt_id for prompt in prompts]
        assert all(PROMPTS[prompt.prompt_id % 5].tokens == prompt.tokens for prompt in prompts)
    assert sorted(ids) == list(range(15))


def test_a_sample_is_the_prompt_and_what_was_sampled_and_trains_on_the_latter() -> None:
    samples = to_samples(PROMPTS, [completion(3, 0, (20, 21, 2)), completion(1, 0, (22,))], [0.5, -1.0])
    first, second = samples
    assert first.tokens == (1, 13, 20, 21, 2) and first.loss_mask == (False, False, True, True, True)
    assert first.sampler_logprobs == (0.0, 0.0, 0.0, -0.5, -1.0)
    assert (first.advantage, second.advantage) == (0.5, -1.0)
    assert second.tokens == (1, 11, 22) and [each.sample_id for each in samples] == [0, 1]


def result(num_tokens: int, **sums: float) -> StepResult:
    names = ("num_clipped", "ref_kl_sum", "k3_sum", "num_beyond", "abs_diff_max")
    return StepResult(
        loss=1.0, grad_norm=2.0, lr=0.1, num_tokens=num_tokens, sums=dict.fromkeys(names, 0.0) | sums
    )


def test_sums_of_minibatches_are_divided_by_all_their_tokens_and_maxima_are_not() -> None:
    metrics = step_metrics(
        4,
        [result(30, k3_sum=6.0, abs_diff_max=0.25), result(10, k3_sum=2.0, num_clipped=4.0)],
        [completion(0, 0, (20, 2)), completion(0, 1, (20, 21, 22, 23), stopped=False)],
        [1.0, 0.0],
        99,
        Stopwatch(),
    )
    assert (metrics.num_tokens, metrics.k3_kl, metrics.clip_share) == (40, 0.2, 0.1)
    assert metrics.logprob_abs_diff_max == 0.25
    assert (metrics.reward_mean, metrics.reward_std, metrics.truncated_share) == (0.5, 0.5, 0.5)
    assert (metrics.completion_length_mean, metrics.policy_version) == (3.0, 7)
    assert metrics.push_bytes_received == 99


def with_k3(value: float) -> StepMetrics:
    return StepMetrics(
        step=3, phase="grpo", loss=0.0, grad_norm=0.0, lr=0.0, num_tokens=1, seconds=StepSeconds(step_s=1.0),
        k3_kl=value, logprob_abs_diff_max=0.5,
    )  # fmt: skip


def test_a_mismatch_at_the_bound_passes() -> None:
    check_mismatch(with_k3(0.01), 0.01)


@pytest.mark.parametrize("value", [0.0101, float("nan"), float("inf")])
def test_a_mismatch_above_the_bound_stops_the_run_and_says_where_to_look(value: float) -> None:
    with pytest.raises(
        MismatchError, match=r"step 3: k3_kl.*above algorithm\.max_k3_kl = 0\.01.*rollout\.dtype"
    ):
        check_mismatch(with_k3(value), 0.01)
