"""FP8 with the backend of Transformer Engine, started as a user does: over the reference of its modules, on a
machine that is said to have all of it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_te_fp8_parameters import gather_one_by_one
from tests.distributed.world import World
from tests.e2e.test_accelerated_runs import losses, train

pytestmark = pytest.mark.one_stack

ALL = ("sft.yaml", "model.backend=transformer_engine", "logging.progress=none", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def te_world() -> Iterator[World]:
    shared = World(path=(Path(__file__).resolve().parents[1] / "te_reference",))
    yield shared
    shared.close()


def train_in_fp8(folder: str, arguments: list[str]) -> dict[str, Any]:
    """On a rank: ``mtrl/train.py``."""
    gather_one_by_one()
    return train(folder, arguments)


def run(world: World, folder: Path, name: str, *overrides: str) -> Path:
    arguments = [*ALL, f"output_dir=runs/{name}", *overrides]
    found = world.run(train_in_fp8, {"folder": str(folder), "arguments": arguments}, size=2, start=False)
    assert [rank["status"] for rank in found] == [0, 0]
    return folder / "runs" / name


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step_000004" / "model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def stopped_at_2(run: Path, name: str) -> Path:
    """A copy of ``run`` as if it had been killed after its first checkpoint."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_000004")
    (copy / "checkpoints" / "latest.json").unlink()
    return copy


@pytest.fixture(scope="module")
def bf16(te_world: World, toy: Path) -> Path:
    return run(te_world, toy, "te bf16", "model.precision=bf16")


# Of four steps of a model of two layers; docs/fp8.md has more.
@pytest.mark.parametrize(("precision", "off"), [("fp8_blockwise", 0.02), ("fp8_delayed", 0.04)])
def test_a_run_in_fp8_trains_nearly_as_one_in_bf16(
    te_world: World, toy: Path, bf16: Path, precision: str, off: float
) -> None:
    run(te_world, toy, f"te {precision}", f"model.precision={precision}")
    found, expected = losses(toy, f"te {precision}"), losses(toy, "te bf16")
    print(found, expected)
    assert found != expected and found == pytest.approx(expected, rel=off)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_parameters_in_fp8_train_and_resume_as_those_in_bf16(
    te_world: World, toy: Path, moments: str
) -> None:
    # Without clipping, since the summands of the norm come in another order.
    blocks = (
        "model.precision=fp8_blockwise",
        "actor.optimizer.grad_clip=1000",
        f"actor.optimizer.moments={moments}",
    )
    plain = run(te_world, toy, f"te kept in bf16, {moments}", *blocks)
    found = run(te_world, toy, f"te kept in fp8, {moments}", *blocks, "model.fp8.parameters=true")
    assert losses(toy, found.name) == losses(toy, plain.name)
    assert same(weights(found), weights(plain))
    again = stopped_at_2(found, f"{found.name}, resumed")
    run(te_world, toy, again.name, *blocks, "model.fp8.parameters=true", "if_exists=resume")
    assert same(weights(again), weights(found))


def test_a_run_with_delayed_scales_resumes_with_them(te_world: World, toy: Path) -> None:
    delayed = ("model.precision=fp8_delayed",)
    whole = run(te_world, toy, "te delayed", *delayed)
    files = sorted(path.name for path in (whole / "checkpoints/step_000002/training").glob("fp8-*"))
    assert files == [f"fp8-{rank:05d}-of-00002.safetensors" for rank in range(2)]
    again = stopped_at_2(whole, "te delayed, resumed")
    run(te_world, toy, again.name, *delayed, "if_exists=resume")
    assert same(weights(again), weights(whole))
