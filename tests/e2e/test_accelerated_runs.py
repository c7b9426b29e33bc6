"""Runs with options that ask for a GPU, started as a user does on a machine that is said to have one: over
the reference of Transformer Engine's modules, and Megatron's optimizer told that tensors are on a GPU.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.pretended_device import pretend
from tests.distributed.world import World

pytestmark = pytest.mark.one_stack

ALL = ("sft.yaml", "model.precision=bf16", "logging.progress=none")
OVERLAPPED = ("model.backend=transformer_engine", "actor.backend=megatron:(attn:t2|ffn:e2)")


@pytest.fixture(scope="module")
def te_world() -> Iterator[World]:
    shared = World(path=(Path(__file__).resolve().parents[1] / "te_reference",))
    yield shared
    shared.close()


def train(folder: str, arguments: list[str]) -> dict[str, Any]:
    """On a rank: ``mtrl/train.py``, whose rules ask a machine on which everything works."""
    from mtrl import preflight
    from mtrl.acceleration import check_acceleration
    from mtrl.parallel.capabilities import Machine, Survey
    from mtrl.parallel.capability_features import FEATURES
    from mtrl.train import main

    able = Survey(
        machine=Machine(gpu="GPU", sm=(9, 0), cuda=(13, 0)),
        packages=(),
        features={feature.name: "" for feature in FEATURES},
    )
    preflight.check_acceleration = functools.partial(check_acceleration, ask=lambda: able)
    pretend()
    os.chdir(folder)
    return {"status": main(arguments), **buffers()}


def buffers() -> dict[str, Any]:
    """What linears took of user buffers, and whether they were given back; nothing without the reference."""
    try:
        from transformer_engine.pytorch import user_buffers
    except ImportError:
        return {}
    return {"uses": sorted(user_buffers.uses), "given back": user_buffers._buffers is None}


def run(world: World, folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    arguments = [*ALL, f"output_dir=runs/{name}", *overrides]
    found: list[dict[str, Any]] = world.run(
        train, {"folder": str(folder), "arguments": arguments}, size=2, start=False
    )
    assert [rank["status"] for rank in found] == [0, 0]
    return found


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_with_user_buffers_trains_as_one_without(te_world: World, toy: Path) -> None:
    plain = run(te_world, toy, "plain", *OVERLAPPED)
    found = run(te_world, toy, "overlapped", *OVERLAPPED, "actor.tp_comm_overlap=true")
    assert all(rank["uses"] == [] for rank in plain)
    assert all(rank["uses"] == ["proj", "qkv"] and rank["given back"] for rank in found)
    # bf16, whose products of rows of another length are rounded otherwise.
    assert losses(toy, "overlapped") == pytest.approx(losses(toy, "plain"), rel=1e-2)


def test_a_run_resumes_with_another_share_of_its_optimizer_on_the_host(world: World, toy: Path) -> None:
    whole = toy / "runs" / "whole"
    run(world, toy, "whole", "actor.optimizer.offload_fraction=1", "checkpoint.every_steps=2")
    half = toy / "runs" / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step_000004")
    (half / "checkpoints" / "latest.json").unlink()
    run(
        world,
        toy,
        "half",
        "actor.optimizer.offload_fraction=0.5",
        "checkpoint.every_steps=2",
        "if_exists=resume",
    )
    expected, found = (
        load_file(each / "checkpoints" / "step_000004" / "model.safetensors") for each in (whole, half)
    )
    assert expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
