"""Every transport brings each element to its target, and counts what arrives."""

import os
import random
import resource
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtrl.parallel import one_machine
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.errors import RolloutError
from mtrl.rollout.shared_weights import map_weights, share_weights
from mtrl.weight_push.transport import CollectiveTransport, RoundSizes, SharedMemoryTransport, choose
from tests.distributed.world import World

pytestmark = pytest.mark.one_stack

DTYPES = (torch.float32, torch.bfloat16)
NUM_ROUNDS, NUM_PUSHES = 5, 3


def rounds_of(world_size: int, seed: int) -> list[RoundSizes]:
    """Random sizes, many of them nothing; the same on all ranks."""
    draw = random.Random(seed)
    return [
        RoundSizes(
            tuple(
                tuple(draw.choice((0, 1, 7, 300)) if source != target else 0 for target in range(world_size))
                for source in range(world_size)
            ),
            DTYPES[number % 2],
        )
        for number in range(NUM_ROUNDS)
    ]


def value(push: int, number: int, source: int, target: int) -> float:
    return float(((push * NUM_ROUNDS + number) * 16 + source * 4 + target) % 251)


def exchange(seed: int) -> dict[str, Any]:
    """Some pushes of the same rounds; what arrived wrong, and the bytes counted beside those expected."""
    rank = dist.get_rank()
    made, sizes = CollectiveTransport(), rounds_of(dist.get_world_size(), seed)
    wires, wrong, counted = made.open(sizes, torch.device("cpu")), [], 0
    for push in range(NUM_PUSHES):
        for number, (wire, each) in enumerate(zip(wires, sizes, strict=True)):
            for target, part in enumerate(wire.sent.split(list(each.elements[rank]))):
                part.fill_(value(push, number, rank, target))
            counted += sum(made.exchange(wire))
            for source, part in enumerate(wire.received):
                expected = torch.full_like(part, value(push, number, source, rank))
                if part.numel() != each.elements[source][rank] or not part.equal(expected):
                    wrong.append([push, number, source])
    expected_bytes = NUM_PUSHES * sum(each.num_received(rank) for each in sizes)
    return {"wrong": wrong, "counted": counted, "expected": expected_bytes}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_sent_arrives(world: World, size: int) -> None:
    for seed in range(2):
        for found in world.run(exchange, {"seed": seed}, size=size):
            assert found["wrong"] == [] and found["counted"] == found["expected"]


def put() -> list[Any]:
    """What ranks find in their own memory after others have written there, and what those said of it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = torch.zeros(world_size, 300)
    everyones = gather_json([os.getpid(), *share_weights({"own": own})])
    windows = [map_weights(shared, files, pid)["own"] for pid, shared, files in everyones]
    transport, found = SharedMemoryTransport(), []
    for push in range(NUM_PUSHES):
        transport.exchange([0] * world_size)  # everyone has read what came before
        time.sleep(0.05 * (rank == 0))  # the others are not to read too early
        for target, window in enumerate(windows):
            window[rank].fill_(value(push, 0, rank, target))
        said = transport.exchange([100 * rank + target for target in range(world_size)])
        seen = [row.unique().tolist() for row in own]
        found.append([said, seen, [[value(push, 0, source, rank)] for source in range(world_size)]])
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_ranks_write_to_each_other_is_there_when_they_have_said_so(world: World, size: int) -> None:
    for rank, found in enumerate(world.run(put, size=size)):
        for said, seen, expected in found:
            assert said == [100 * source + rank for source in range(size)]
            assert seen == expected


def chosen() -> list[str]:
    cpu = torch.device("cpu")
    return [choose(name, cpu).name for name in ("auto", "collective", "shared_memory")]


def chosen_without_memory() -> list[str]:
    """Where one rank can share nothing: another kind of system."""
    if dist.get_rank() == 1:
        one_machine._HAS_SHARED_FILES = False
    cpu, found = torch.device("cpu"), []
    for name in ("auto", "collective", "shared_memory"):
        try:
            found.append(choose(name, cpu).name)
        except RolloutError as error:
            found.append(str(error))
    return found


def chosen_without_room() -> list[str]:
    """Where one rank can write nothing into its file."""
    if dist.get_rank() == 0:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    cpu, found = torch.device("cpu"), []
    for name in ("auto", "shared_memory"):
        try:
            found.append(choose(name, cpu).name)
        except RolloutError as error:
            found.append(str(error))
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return found


def test_a_rank_that_cannot_write_its_share_is_no_error_of_auto(world: World) -> None:
    for found in world.run(chosen_without_room, size=2):
        assert found[0] == "collective" and "rollout.push_transport=auto" in found[1]


def test_memory_is_shared_where_all_ranks_can(world: World) -> None:
    assert world.run(chosen, size=2) == [["shared_memory", "collective", "shared_memory"]] * 2
    for found in world.run(chosen_without_memory, size=2):
        assert found[:2] == ["collective", "collective"] and "rollout.push_transport=auto" in found[2]
