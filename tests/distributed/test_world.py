import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.world import World, WorldError


def total(start: int) -> dict[str, object]:
    tensor = torch.full((2,), float(start + dist.get_rank()))
    dist.all_reduce(tensor)
    return {"sum": tensor, "nested": [{"rank": dist.get_rank()}]}


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a reason that must be shown")
    dist.barrier()


def sleep_forever() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_of_every_size_returns_its_own_result(world: World, size: int) -> None:
    results = world.run(total, {"start": 10}, size=size)
    expected = float(sum(10 + rank for rank in range(size)))
    assert [each["nested"] for each in results] == [[{"rank": rank}] for rank in range(size)]
    assert all(torch.equal(each["sum"], torch.full((2,), expected)) for each in results)


def test_an_exception_on_one_rank_is_shown_and_ends_the_others(world: World) -> None:
    with pytest.raises(WorldError, match="a reason that must be shown"):
        world.run(fail_on_rank_1, size=2)


def test_a_rank_that_hangs_is_ended_and_its_stack_shown(world: World) -> None:
    with pytest.raises(WorldError, match="sleep_forever"):
        world.run(sleep_forever, size=2, timeout_s=1.0)
