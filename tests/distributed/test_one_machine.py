"""What ranks of one machine say through pipes reaches all of them, in order; who ends is named."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mtrl.parallel.errors import LostRanksError
from mtrl.parallel.one_machine import Pipes
from tests.distributed.world import World, WorldError

pytestmark = pytest.mark.one_stack

NUM_WORDS = 300


def tell_each_other() -> list[Any]:
    """Ranks that are late at random, so that others are an exchange ahead of them."""
    pipes, draw, heard = Pipes(30.0), random.Random(dist.get_rank()), []
    for number in range(NUM_WORDS):
        if draw.random() < 0.05:
            time.sleep(0.003)
        heard.append(pipes.tell((number + dist.get_rank()) % 7 == 0, -number * 1000 - dist.get_rank()))
    return heard


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_hears_every_word_of_every_rank_in_order(world: World, size: int) -> None:
    expected = [
        [[(number + rank) % 7 == 0, -number * 1000 - rank] for rank in range(size)]
        for number in range(NUM_WORDS)
    ]
    assert world.run(tell_each_other, size=size) == [expected] * size


def last_words_count() -> list[Any]:
    """Rank 1 ends well after its last exchange, while rank 2 is late for it; the others hear both."""
    pipes = Pipes(30.0)
    if dist.get_rank() == 2:
        time.sleep(0.3)
    return pipes.tell(False, dist.get_rank())


def test_a_rank_that_ends_after_its_last_word_is_not_lost(world: World) -> None:
    assert world.run(last_words_count, size=3) == [[[False, 0], [False, 1], [False, 2]]] * 3


def silenced(timeout_s: float, *, kill: bool) -> str:
    """Rank 1 ends, or says nothing; what the others are told."""
    pipes = Pipes(timeout_s)
    pipes.tell(False, 0)
    if dist.get_rank() == 1:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * timeout_s)
        return ""
    try:
        pipes.tell(False, 1)
    except LostRanksError as error:
        return str(error)
    return "heard it"


def test_a_rank_that_says_nothing_is_named_when_time_is_up(world: World) -> None:
    assert world.run(silenced, {"timeout_s": 0.5, "kill": False}, size=3) == [
        "rank 1 said nothing for 0.5 s",
        "",
        "rank 1 said nothing for 0.5 s",
    ]


def dying(folder: str) -> None:
    told = silenced(60.0, kill=True)
    with open(f"{folder}/{dist.get_rank()}", "w") as file:
        file.write(told)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_dies_is_named_at_once(world: World, tmp_path: Path, size: int) -> None:
    with pytest.raises(WorldError, match="rank 1"):
        world.run(dying, {"folder": str(tmp_path)}, size=size, timeout_s=30)
    others = [rank for rank in range(size) if rank != 1]
    assert [(tmp_path / str(rank)).read_text() for rank in others] == ["rank 1 has ended"] * len(others)
