"""After a push: do sampler and trainer give the same log-probabilities? (``rollout.verify: logits``)"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtrl.batch import Prompt
from mtrl.exchange import max_over_ranks, sum_over_ranks
from mtrl.parallel.errors import MismatchError
from mtrl.policy import make_microbatches
from mtrl.rl import to_samples
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all
from mtrl.trainer import Trainer

NUM_PROMPTS, NUM_TOKENS = 8, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Samples a little and computes it again; ``temperature`` is the trainer's.

    Every prompt leaves room for ``num_tokens`` more in the engine; ``max_tokens`` bounds a microbatch.
    """

    engine: InPlaceEngine
    trainer: Trainer
    prompts: Sequence[Prompt]
    num_tokens: int
    max_k3_kl: float
    temperature: float
    max_tokens: int
    pad_token_id: int

    def run(self) -> None:
        """Compare. Collective over WORLD.

        Raises:
            MismatchError: on all ranks, when k3 (Schulman's estimator of the KL divergence, nats a token) is
                above ``max_k3_kl``.
        """
        drawn = SamplingSettings(
            temperature=self.temperature,
            top_p=1.0,
            max_new_tokens=self.num_tokens,
            num_samples=1,
            stop_token_ids=(),
        )
        prompts = self.prompts[:NUM_PROMPTS]
        completions = sample_on_all(self.engine, prompts, drawn, seed=0)
        samples = to_samples(prompts, completions, [0.0] * len(completions))
        policy = self.trainer.policy
        batch = make_microbatches(
            samples, policy.model, max_tokens=self.max_tokens, pad_token_id=self.pad_token_id
        )
        ratios = torch.cat(
            [
                (computed_T - each.packed.sampler_logprobs_T)[each.packed.loss_mask_T].double()
                for each, computed_T in zip(batch, policy.logprobs(batch), strict=True)
            ]
            or [torch.zeros(0)]
        )
        k3 = float((ratios.exp() - 1 - ratios).sum())
        k3_mean = sum_over_ranks(k3) / max(sum_over_ranks(float(ratios.numel())), 1.0)
        largest = max_over_ranks(float(ratios.abs().max()) if ratios.numel() else 0.0)
        if not k3_mean <= self.max_k3_kl:
            raise MismatchError(
                f"after a push, k3_kl between sampler and trainer is {k3_mean:.3g} nats a token on "
                f"{len(prompts)} prompts, above algorithm.max_k3_kl = {self.max_k3_kl:g} (largest difference "
                f"{largest:.3g}): the engine does not compute with the trainer's weights"
            )
