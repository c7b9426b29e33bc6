"""What vLLM is asked for, and what it answers: both checked, and in mtrl's words."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import RolloutError
from mtrl.rollout.protocol import SamplingSettings


def check_request(
    prompts: Sequence[Prompt], sampling: SamplingSettings, *, max_model_len: int, vocab_size: int
) -> None:
    """RolloutError where a prompt does not fit, holds no token of the model, or occurs twice."""
    for prompt in prompts:
        length = len(prompt.tokens)
        if length == 0 or length + sampling.max_new_tokens > max_model_len:
            raise RolloutError(
                f"prompt {prompt.prompt_id} has {length} tokens; with max_new_tokens "
                f"{sampling.max_new_tokens} and max_model_len {max_model_len} it must have 1 to "
                f"{max_model_len - sampling.max_new_tokens}"
            )
        if min(prompt.tokens) < 0 or max(prompt.tokens) >= vocab_size:
            raise RolloutError(f"prompt {prompt.prompt_id} has a token outside 0..{vocab_size - 1}")
    ids = [prompt.prompt_id for prompt in prompts]
    if len(set(ids)) != len(ids):
        raise RolloutError("a prompt_id occurs twice: both prompts would get the same seeds")


def requests(prompts: Sequence[Prompt], sampling: SamplingSettings) -> Iterator[tuple[Prompt, int]]:
    """What each completion answers: a prompt, and which of its samples it is."""
    for prompt in prompts:
        for index in range(sampling.num_samples):
            yield prompt, index


def sampling_params(sampling: SamplingSettings, seed: int) -> Any:
    """vLLM's words for these settings and one completion's seed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p if sampling.temperature else 1.0,
        max_tokens=sampling.max_new_tokens, stop_token_ids=list(sampling.stop_token_ids), ignore_eos=True,
        seed=seed, logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def completion_of(
    output: Any,
    prompt: Prompt,
    index: int,
    sampling: SamplingSettings,
    *,
    policy_version: int,
    decode: Callable[[Sequence[int]], str],
) -> Completion:
    """vLLM's output as a completion; RolloutError where it is not what was asked for."""
    (sampled,) = output.outputs
    tokens, logprobs = tuple(sampled.token_ids), tuple(sampled.logprobs.logprobs)
    where = f"completion {index} of prompt {prompt.prompt_id}"
    if tuple(sampled.logprobs.token_ids) != tokens:
        raise RolloutError(f"{where}: log-probabilities are not those of its tokens")
    if not all(math.isfinite(value) and value <= 1e-5 for value in logprobs):
        raise RolloutError(f"{where}: a log-probability is not a finite number at most 0: {logprobs}")
    stopped = bool(tokens) and tokens[-1] in sampling.stop_token_ids
    if sampled.finish_reason != ("stop" if stopped else "length") or not tokens:
        raise RolloutError(
            f"{where}: vLLM ended it with {sampled.finish_reason!r} after {len(tokens)} tokens"
        )
    if not stopped and len(tokens) != sampling.max_new_tokens:
        raise RolloutError(
            f"{where}: {len(tokens)} tokens, neither stopped nor {sampling.max_new_tokens} long"
        )
    return Completion(
        prompt_id=prompt.prompt_id, sample_index=index, tokens=tokens, logprobs=logprobs,
        finish_reason="stop" if stopped else "length", policy_version=policy_version, text=decode(tokens),
    )  # fmt: skip
