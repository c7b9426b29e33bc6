"""The short form of ``make torture``: some points of one run, and every damage to a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.world import World
from tests.torture.matrix import JOBS, Torture, Trial

CHOSEN = (
    ("kill", "before forward pass"),
    ("kill all", "after optimizer step"),
    ("half", "write .step_000003.partial/model.safetensors"),
    ("kill", "rename checkpoints/.step_000003.partial"),
    ("kill all", "replace checkpoints/.latest.json"),
    ("ENOSPC", "write training/optimizer-00000-of-00002.safetensors"),
    ("EIO", "fsync .step_000003.partial/manifest.json"),
    ("EIO", "replace checkpoints/.latest.json"),
)


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Torture]:
    world = World()
    yield Torture(world, tmp_path_factory.mktemp("torture"), JOBS[0])
    world.close()


@pytest.mark.parametrize(("action", "what"), CHOSEN, ids=[" ".join(each) for each in CHOSEN])
def test_a_run_stopped_at_any_point_goes_on_as_if_it_had_not_been(
    torture: Torture, action: str, what: str
) -> None:
    number = max(n for n, each in enumerate(torture.points[0]) if each.startswith(what))
    assert torture.run(Trial(job=torture.job.name, rank=0, number=number, what=what, action=action)) == ""


def test_every_damaged_file_is_noticed_and_named(torture: Torture) -> None:
    found = list(torture.damages())
    assert len(found) >= 40
    assert [each for each in found if each[2]] == []


def test_a_second_rank_that_dies_takes_the_run_down_and_nothing_else(torture: Torture) -> None:
    number = torture.points[1].index("write training/rng-00001-of-00002.safetensors")
    trial = Trial(job=torture.job.name, rank=1, number=number, what="rank 1 writes", action="kill")
    assert torture.run(trial) == ""


@pytest.mark.vllm
def test_so_it_is_in_rl_reference_and_sampling_included(tmp_path: Path) -> None:
    world = World()
    torture = Torture(world, tmp_path, next(job for job in JOBS if job.is_rl))
    number = max(n for n, each in enumerate(torture.points[0]) if each == "before exchange of weights")
    trial = Trial(job="grpo", rank=0, number=number, what="the last push or save", action="kill all")
    assert torture.run(trial) == ""
    world.close()
