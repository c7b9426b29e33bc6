import pytest
import torch
import torch.distributed as dist

from mtrl.parallel import groups
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from tests.distributed.world import World

SPECS_OF_FOUR = [
    "megatron:d4",
    "megatron:d2t2",
    "megatron:t2c2",
    "megatron:d2p2",
    "megatron:d4e4",
    "megatron:p2t2e2",
    "megatron:(attn:d2t2|ffn:e4)",
    "megatron:(attn:d4|ffn:t2e2)",
    "megatron:(attn:t2c2|ffn:t2e2)",
]


def describe(spec: str) -> dict[str, object]:
    layout = RankLayout.from_spec(parse_training_spec(spec))
    made = groups.create(layout)
    named = {
        "attn.tp": made.attn.tp,
        "attn.cp": made.attn.cp,
        "attn.pp": made.attn.pp,
        "attn.dp": made.attn.dp,
        "ffn.etp": made.ffn.etp,
        "ffn.ep": made.ffn.ep,
        "ffn.pp": made.ffn.pp,
        "ffn.edp": made.ffn.edp,
    }
    sums = {}
    for axis, group in named.items():
        rank_bit = torch.tensor([2**made.rank])
        dist.all_reduce(rank_bit, group=group)
        sums[axis] = int(rank_bit)
    return {"rank": made.rank, "sums": sums}


@pytest.mark.parametrize("spec", SPECS_OF_FOUR)
def test_a_sum_over_each_group_holds_exactly_the_ranks_of_the_layout(world: World, spec: str) -> None:
    layout = RankLayout.from_spec(parse_training_spec(spec))
    for found in world.run(describe, {"spec": spec}, size=4):
        for axis, total in found["sums"].items():
            mine = next(group for group in layout.groups(axis) if found["rank"] in group)
            assert total == sum(2**rank for rank in mine), axis


def create_twice(spec: str) -> dict[str, object]:
    layout = RankLayout.from_spec(parse_training_spec(spec))
    groups.destroy()
    first = groups.create(layout)
    with pytest.raises(LayoutError, match="exist already"):
        groups.create(layout)
    groups.destroy()
    assert len(dist.distributed_c10d._world.pg_map) == 1
    second = groups.create(layout)
    return {"same": first.coordinates == second.coordinates}


def test_groups_can_be_destroyed_and_made_again(world: World) -> None:
    assert world.run(create_twice, {"spec": "megatron:(attn:t2|ffn:e2)"}, size=2) == [{"same": True}] * 2


def create_for_wrong_world() -> str:
    with pytest.raises(LayoutError, match="4 ranks, but torchrun started 2") as error:
        groups.create(RankLayout.from_spec(parse_training_spec("megatron:d4")))
    return str(error.value)


def test_a_layout_for_another_world_size_is_refused_with_both_numbers(world: World) -> None:
    messages = world.run(create_for_wrong_world, size=2)
    assert all("--nproc-per-node 4" in message for message in messages)


def draws(spec: str, seed: int) -> dict[str, object]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    made = groups.create(RankLayout.from_spec(parse_training_spec(spec)))
    groups.seed_everything(seed, made)
    tracker = get_cuda_rng_tracker()
    with tracker.fork():
        tensor_parallel = torch.rand(1)
    with tracker.fork("expert-parallel-rng"):
        expert = torch.rand(1)
    return {"plain": torch.rand(1), "tensor_parallel": tensor_parallel, "expert": expert}


def test_seeded_draws_agree_across_data_parallel_ranks_and_differ_across_tensor_parallel_ones(
    world: World,
) -> None:
    found = world.run(draws, {"spec": "megatron:(attn:d2t2|ffn:d2e2)", "seed": 5}, size=4)
    plain, shards, experts = (
        [float(each[key]) for each in found] for key in ("plain", "tensor_parallel", "expert")
    )
    assert len(set(plain)) == 1
    assert shards[0] == shards[2] and shards[1] == shards[3] and shards[0] != shards[1]
    assert experts[0] == experts[2] and experts[1] == experts[3] and experts[0] != experts[1]
    assert len({*plain, *shards, *experts}) == 5
