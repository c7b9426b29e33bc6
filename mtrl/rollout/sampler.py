"""Sampling over all engine replicas: deal prompts out, gather completions, score them."""

from collections.abc import Sequence

import torch.distributed as dist

from mtrl.batch import Completion, Prompt
from mtrl.exchange import all_gather_completions, broadcast_floats
from mtrl.rewards import Reward
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.protocol import SamplingSettings


def sample_on_all(
    engine: InPlaceEngine, prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int
) -> list[Completion]:
    """Completions of all prompts, on every rank, ordered by prompt id, then sample index.

    Each replica samples every ``num_replicas``-th prompt. Collective over WORLD; all ranks pass the same.
    """
    share = prompts[engine.replica_index :: engine.num_replicas]
    own = engine.generate(share, sampling, seed=seed)
    # All ranks of an engine hold its completions; one of them speaks for it.
    return all_gather_completions(own if engine.engine_rank == 0 else [])


def score_on_all(reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """Rewards of completions, on every rank. Collective over WORLD.

    Rank 0 computes them all: a user's reward may be costly, or may not give the same number twice.
    """
    values = reward(prompts, completions) if dist.get_rank() == 0 else []
    return broadcast_floats(values, len(completions))
