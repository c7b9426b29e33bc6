"""Collectives that gloo lacks, as Megatron sees them, against their definitions."""

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtrl.parallel.device import current_device
from tests.distributed.world import World

pytestmark = pytest.mark.skipif(current_device().kind == "cuda", reason="NCCL has these collectives")
LENGTHS = [3, 0, 2, 5]
WIDTH = 2


def seen_by_megatron() -> Any:
    return importlib.import_module("megatron.core.tensor_parallel.mappings").torch.distributed


def rows_of(rank: int) -> torch.Tensor:
    return torch.arange(LENGTHS[rank] * WIDTH, dtype=torch.float32).reshape(-1, WIDTH) + 100 * rank


def gather_uneven() -> torch.Tensor:
    parts = [torch.full((length, WIDTH), -1.0) for length in LENGTHS]
    seen_by_megatron().all_gather(parts, rows_of(dist.get_rank()))
    return torch.cat(parts)


def reduce_scatter_uneven() -> torch.Tensor:
    rank = dist.get_rank()
    output = torch.full((LENGTHS[rank], WIDTH), -1.0)
    seen_by_megatron().reduce_scatter(output, [rows_of(each) * (rank + 1) for each in range(4)])
    return output


def average_over_pairs() -> torch.Tensor:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tensor = torch.tensor([float(dist.get_rank())])
    seen_by_megatron().all_reduce(tensor, op=dist.ReduceOp.AVG, group=pairs[dist.get_rank() // 2])
    return tensor


def test_gathering_uneven_parts_gives_every_rank_all_rows_in_rank_order(world: World) -> None:
    expected = torch.cat([rows_of(rank) for rank in range(4)])
    assert all(torch.equal(found, expected) for found in world.run(gather_uneven, size=4))


def test_reduce_scatter_of_uneven_parts_gives_each_rank_the_sum_of_its_part(world: World) -> None:
    for rank, found in enumerate(world.run(reduce_scatter_uneven, size=4)):
        assert torch.equal(found, rows_of(rank) * (1 + 2 + 3 + 4))


def test_an_average_is_over_the_group_and_not_the_world(world: World) -> None:
    assert [float(each) for each in world.run(average_over_pairs, size=4)] == [0.5, 0.5, 2.5, 2.5]
