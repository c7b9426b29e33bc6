"""An engine in a process of its own fails as one in the trainer's does, and ends with its trainer.

That it samples and takes weights as one in the trainer's process does: test_push.py.
"""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mtrl.parallel.errors import RolloutError
from mtrl.rollout.shared_weights import map_weights, share_weights
from tests.distributed.world import World, WorldError
from tests.rollout.own_process_scenarios import dying_trainer, failures

pytestmark = pytest.mark.vllm

ERRORS = {
    "another weight": "WeightError: .*model.nothing.weight",
    "same prompt twice": "RolloutError: a prompt_id occurs twice",
    "bad copy": "a copy of the push failed",
    "versions": r"RolloutError: ranks have different policy versions: \[2, 3\]",
    "killed": "RolloutError: .*engine's process [0-9]+ was killed by signal 9",
}


@pytest.fixture(scope="module")
def found(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("own"))
    results: list[dict[str, Any]] = rollout_world.run(failures, {"folder": folder}, size=2, timeout_s=200)
    return results


@pytest.mark.parametrize("failure", ERRORS)
def test_its_errors_are_the_same_on_all_ranks(found: list[dict[str, Any]], failure: str) -> None:
    for rank in found:
        assert re.search(ERRORS[failure], rank[failure])


def test_it_samples_from_whole_weights_alone(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["refused after it"] and rank["refused after them"] and rank["recovers"]
        assert rank["refused after it was killed"]


def test_its_process_ends_with_it(found: list[dict[str, Any]]) -> None:
    assert found[0]["process"] == 0 and "holds no weights" in found[0]["after the end"]
    assert "was killed by signal 9" in found[1]["asked again"]


def test_its_process_ends_with_its_trainer(rollout_world: World, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="rank 1 died"):
        rollout_world.run(dying_trainer, {"folder": str(tmp_path)}, size=2, timeout_s=120)
    engines = [int((tmp_path / f"engine{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 20
    while any(_runs(each) for each in engines) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(each) for each in engines)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_shared_weights_are_the_same_memory_for_all_that_use_them() -> None:
    whole = torch.arange(12.0).view(3, 4)
    weights = {"whole": whole, "part": whole[1:, 2:], "other": torch.ones(5, dtype=torch.bfloat16)}
    alias = whole.T
    shared, descriptors = share_weights(weights)
    mapped = map_weights(shared, descriptors)
    assert all(mapped[name].equal(weights[name]) for name in weights)
    mapped["whole"].mul_(2.0)
    mapped["other"][3] = 7.0
    assert whole.equal(2 * torch.arange(12.0).view(3, 4)) and alias.equal(whole.T)
    assert weights["part"].equal(mapped["part"]) and weights["other"][3] == 7.0


def test_weights_that_more_than_tensors_of_python_hold_are_not_shared() -> None:
    weight = torch.ones(4)
    # Autograd keeps a transposed view, which Python has never seen.
    product = torch.nn.functional.linear(torch.ones(2, 2, requires_grad=True), weight.view(2, 2))
    with pytest.raises(RolloutError, match="weight is held by more than tensors"):
        share_weights({"weight": weight})
    del product
    share_weights({"weight": torch.ones(4)})
