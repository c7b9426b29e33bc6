"""What a training loop asks of a rollout engine; pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn.

    ``temperature`` 0 is greedy (then ``top_p`` has no effect); ``num_samples`` completions a prompt of at
    most ``max_new_tokens`` tokens each; a token of ``stop_token_ids`` ends a completion and stays in it.
    Nothing else ends one: the model folder's own end-of-sequence token counts only if it is listed.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    num_samples: int
    stop_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.num_samples < 1:
            raise ConfigError(f"num_samples is {self.num_samples}; it must be at least 1")
        if any(token < 0 for token in self.stop_token_ids):
            raise ConfigError(f"stop_token_ids holds a negative id: {self.stop_token_ids}")


class RolloutEngine(Protocol):
    """An engine that samples from the policy; one replica's share of it lives in this process."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next ``generate`` samples from.

        RolloutError before the first ``load_weights`` and after one that failed.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int
    ) -> list[Completion]:
        """Sample ``num_samples`` completions of each prompt, ordered by prompt, then by ``sample_index``.

        Only this replica's share of the prompts is passed. Collective over the ranks of one replica, which
        pass and get the same. A pure function of weights, prompts, sampling, ``seed`` and version:
        the trainer's random states stay as they were.
        """
        ...

    def load_weights(self, named: Iterable[tuple[str, "Tensor"]], *, policy_version: int) -> None:
        """Take over the whole model from full tensors under their Hugging Face names.

        Collective over the ranks of one replica, in the same order. WeightError when a name is unknown,
        missing or doubled; the engine then refuses to sample until a load succeeds.
        """
        ...

    def shutdown(self) -> None:
        """Free the engine; torch.distributed stays as it is."""
        ...
