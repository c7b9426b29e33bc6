"""The records that travel between data, rollout and trainer.

A *prompt* is sampled several times; its completions form a *group*; a prompt with one completion
becomes one *sample*; samples are packed into microbatches (``packing.py``).
All of them are plain tuples of numbers: no tensors, so they hash, compare and print.
"""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the policy is asked.

    ``tokens`` are the token ids of ``text``; ``answer`` is what the reward compares with ("" if none).
    """

    prompt_id: int
    tokens: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation of a prompt.

    ``logprobs[i]`` is the natural log of the probability with which ``tokens[i]`` was drawn (after
    temperature and top-p, float32). The end-of-sequence token is the last of ``tokens`` when the
    policy stopped by itself. ``policy_version`` is the version of the weights that sampled it.
    """

    prompt_id: int
    sample_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    text: str

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.logprobs), "one log-probability per token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence to train on.

    ``loss_mask[t]`` says whether token ``t`` is trained on, as a prediction from the tokens before
    it; ``loss_mask[0]`` is therefore always False. ``sampler_logprobs[t]`` is the log-probability
    with which the rollout engine drew token ``t`` (0.0 where the mask is False; empty in SFT).
    ``advantage`` multiplies every trained token of the sample (0.0 in SFT).
    """

    sample_id: int
    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    sampler_logprobs: tuple[float, ...] = ()
    advantage: float = 0.0

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.loss_mask) > 0, "tokens and loss_mask go together"
        assert not self.loss_mask[0], "the first token has nothing before it to be predicted from"
        assert len(self.sampler_logprobs) in (0, len(self.tokens))

    @property
    def num_loss_tokens(self) -> int:
        """How many tokens of this sample are trained on."""
        return sum(self.loss_mask)
