"""Group relative policy optimisation (GRPO, arXiv 2402.03300), a step at a time:

prompts -> completions (engine) -> rewards -> advantages -> samples -> microbatches -> update -> push
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean, pstdev

from torch import Tensor

from mtrl.advantages import batch_advantages
from mtrl.batch import Completion, Prompt, Sample
from mtrl.config import Config
from mtrl.data.order import DataCursor
from mtrl.metrics import StepMetrics, Stopwatch
from mtrl.objectives import GrpoLoss
from mtrl.parallel.errors import MismatchError
from mtrl.policy import Microbatch
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all, score_on_all
from mtrl.session import Session
from mtrl.trainer import StepResult


def train_rl(session: Session) -> None:
    """Run GRPO from the session's position to ``algorithm.total_steps``. Collective over WORLD.

    Raises:
        MismatchError: sampler and trainer disagree by more than ``algorithm.max_k3_kl``.
    """
    job, config, sampling = session.job, session.job.config, session.sampling
    assert sampling is not None and job.reward is not None, "GRPO has an engine and a reward"
    algorithm, drawn = config.algorithm, sampling_settings(config, job.stop_token_ids)
    reference = session.reference_weights() if algorithm.kl_coef else None
    session.progress.start_phase("grpo", algorithm.total_steps)
    for step in range(session.position.step + 1, algorithm.total_steps + 1):
        watch = session.stopwatch()
        cursor, count = session.position.cursor, algorithm.prompts_per_step or 1
        prompts, cursor = next_prompts(job.train_prompts, cursor, count)
        with watch("generate_s"):
            session.turn_to("sampling")
            completions = sample_on_all(sampling.engine, prompts, drawn, seed=config.seed)
        with watch("reward_s"):
            rewards = score_on_all(job.reward, prompts, completions)
        advantages = batch_advantages(rewards, [c.prompt_id for c in completions], algorithm.advantage)
        samples = to_samples(prompts, completions, advantages)
        results = update(session, samples, reference, watch)
        with watch("push_s"):
            push_bytes = sampling.take_over_weights()
        session.advance(cursor)
        metrics = step_metrics(session.step, results, completions, rewards, push_bytes, watch)
        session.writer.write_step(metrics)
        session.progress.update(metrics)
        check_mismatch(metrics, algorithm.max_k3_kl)
        if session.is_due(config.evaluation.every_steps, step, algorithm.total_steps):
            session.evaluate("grpo")
        session.end_step(save=session.is_due(config.checkpoint.every_steps, step, algorithm.total_steps))


def update(
    session: Session, samples: list[Sample], reference: Sequence[Tensor] | None, watch: Stopwatch
) -> list[StepResult]:
    """Make ``minibatches_per_step`` optimizer updates from one batch of samples."""
    trainer, algorithm = session.trainer, session.job.config.algorithm
    num_minibatches, loss = algorithm.minibatches_per_step, GrpoLoss(algorithm)
    batches = [session.microbatches(samples[n::num_minibatches]) for n in range(num_minibatches)]
    with watch("logprobs_s"):
        session.turn_to("training")
        if num_minibatches > 1:  # else the policy has not moved when it is trained: see GrpoLoss
            batches = [with_logprobs(batch, old=trainer.policy.logprobs(batch)) for batch in batches]
        if reference is not None:
            with trainer.weights_swapped(reference):
                batches = [with_logprobs(batch, ref=trainer.policy.logprobs(batch)) for batch in batches]
    with watch("train_s"):
        return [trainer.step(batch, loss) for batch in batches]


def with_logprobs(
    batch: Sequence[Microbatch], *, old: Sequence[Tensor] = (), ref: Sequence[Tensor] = ()
) -> list[Microbatch]:
    """The microbatches with log-probabilities of the old or the reference policy filled in."""
    if old:
        return [replace(each, old_logprobs_T=value) for each, value in zip(batch, old, strict=True)]
    return [replace(each, ref_logprobs_T=value) for each, value in zip(batch, ref, strict=True)]


def sampling_settings(config: Config, stop_token_ids: tuple[int, ...]) -> SamplingSettings:
    """How training completions are drawn."""
    rollout = config.rollout
    return SamplingSettings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        num_samples=rollout.n_samples,
        stop_token_ids=stop_token_ids,
    )


def next_prompts(
    prompts: Sequence[Prompt], cursor: DataCursor, count: int
) -> tuple[list[Prompt], DataCursor]:
    """The next prompts in shuffled epochs. Their ids count epochs too, so that each has its own seeds."""
    position = cursor.epoch * cursor.num_records + cursor.index
    indices, cursor = cursor.take(count)
    epochs = [(position + n) // cursor.num_records for n in range(count)]
    return [
        replace(prompts[index], prompt_id=epoch * cursor.num_records + index)
        for epoch, index in zip(epochs, indices, strict=True)
    ], cursor


def to_samples(
    prompts: Sequence[Prompt], completions: Sequence[Completion], advantages: Sequence[float]
) -> list[Sample]:
    """Prompt and completion as one sequence, trained on the completion."""
    prompt_of = {prompt.prompt_id: prompt for prompt in prompts}
    samples = []
    for number, (completion, advantage) in enumerate(zip(completions, advantages, strict=True)):
        prompt = prompt_of[completion.prompt_id].tokens
        samples.append(
            Sample(
                sample_id=number,
                tokens=prompt + completion.tokens,
                loss_mask=(False,) * len(prompt) + (True,) * len(completion.tokens),
                sampler_logprobs=(0.0,) * len(prompt) + completion.logprobs,
                advantage=advantage,
            )
        )
    return samples


def step_metrics(
    step: int,
    results: Sequence[StepResult],
    completions: Sequence[Completion],
    rewards: Sequence[float],
    push_bytes: int,
    watch: Stopwatch,
) -> StepMetrics:
    """One line of metrics; sums over minibatches are divided by all trained tokens."""
    num_tokens = sum(result.num_tokens for result in results)

    def per_token(name: str) -> float:
        return sum(result.sums[name] for result in results) / max(num_tokens, 1)

    return StepMetrics(
        step=step,
        phase="grpo",
        loss=fmean(result.loss for result in results),
        grad_norm=fmean(result.grad_norm for result in results),
        lr=results[-1].lr,
        num_tokens=num_tokens,
        router_aux_loss=_mean(result.router.aux_loss for result in results if result.router),
        router_z_loss=_mean(result.router.z_loss for result in results if result.router),
        seconds=watch.read(),
        reward_mean=fmean(rewards),
        reward_std=pstdev(rewards),
        completion_length_mean=fmean(len(each.tokens) for each in completions),
        truncated_share=fmean(each.finish_reason == "length" for each in completions),
        clip_share=per_token("num_clipped"),
        ref_kl=per_token("ref_kl_sum"),
        logprob_abs_diff_max=max(result.sums["abs_diff_max"] for result in results),
        logprob_mismatch_share=per_token("num_beyond"),
        k3_kl=per_token("k3_sum"),
        policy_version=completions[0].policy_version,
        push_bytes_received=push_bytes,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def check_mismatch(metrics: StepMetrics, max_k3_kl: float) -> None:
    """Stop when sampler and trainer do not compute the same probabilities from the same weights."""
    if metrics.k3_kl is None or metrics.k3_kl <= max_k3_kl:
        return
    raise MismatchError(
        f"step {metrics.step}: k3_kl between sampler and trainer is {metrics.k3_kl:.3g} nats a token, above "
        f"algorithm.max_k3_kl = {max_k3_kl:g} (largest difference {metrics.logprob_abs_diff_max:.3g}). "
        "Either the engine's numbers differ (rollout.dtype against model.precision) or its weights are not "
        "the trainer's; raise the bound only if you know the cause."
    )
