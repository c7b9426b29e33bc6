"""Completions and rewards between real gloo ranks."""

import torch
import torch.distributed as dist

from mtrl.batch import Completion
from mtrl.exchange import (
    all_gather_completions,
    all_gather_ragged,
    broadcast_floats,
    max_over_ranks,
    sum_over_ranks,
)
from tests.distributed.world import World

SIZE = 3


def completion(prompt_id: int, sample_index: int, num_tokens: int) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        sample_index=sample_index,
        tokens=tuple(range(10, 10 + num_tokens)),
        logprobs=tuple(-0.1 * (n + prompt_id) for n in range(num_tokens)),
        finish_reason="stop" if num_tokens % 2 else "length",
        policy_version=4,
        text="é" * num_tokens,
    )


def of_rank(rank: int) -> list[Completion]:
    """Rank 0 has the last prompts, rank 1 none at all."""
    if rank == 1:
        return []
    return [completion(2 - rank + 10, index, 1 + rank + index) for index in range(2)]


def everything() -> dict[str, object]:
    rank = dist.get_rank()
    mine = of_rank(rank)
    gathered = all_gather_completions(mine)
    own = {(each.prompt_id, each.sample_index): each for each in gathered}
    return {
        "order": [[each.prompt_id, each.sample_index] for each in gathered],
        "own came back": all(
            own[each.prompt_id, each.sample_index].tokens == each.tokens
            and own[each.prompt_id, each.sample_index].text == each.text
            and own[each.prompt_id, each.sample_index].finish_reason == each.finish_reason
            for each in mine
        ),
        "repr": repr(gathered),
        "nothing": all_gather_completions([]),
        "ragged": [part.tolist() for part in all_gather_ragged(torch.arange(rank * 2))],
        "floats": broadcast_floats([0.1, 1e300] if rank == 0 else [], 2),
        "max": max_over_ranks(float(rank)),
        "sum": sum_over_ranks(2.0**40 + rank),
    }


def test_every_rank_has_all_completions_in_one_order(world: World) -> None:
    results = world.run(everything, size=SIZE)
    for result in results:
        assert result["own came back"]
        assert result["order"] == [[10, 0], [10, 1], [12, 0], [12, 1]]
        assert result["repr"] == results[0]["repr"] and result["nothing"] == []


def test_numbers_arrive_exactly(world: World) -> None:
    for result in world.run(everything, size=SIZE):
        assert result["ragged"] == [[], [0, 1], [0, 1, 2, 3]]
        assert result["floats"] == [0.1, 1e300]
        assert (result["max"], result["sum"]) == (2.0, 3 * 2.0**40 + 3)
