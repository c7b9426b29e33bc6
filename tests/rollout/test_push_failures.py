"""A push that fails on any rank fails on all, says why, and leaves no engine that samples mixed weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.world import World, WorldError
from tests.rollout.failure_scenarios import dying_push, failing_pushes, late_pause, without_room

pytestmark = pytest.mark.vllm

ERRORS = {
    "with_another_weight": "MismatchError: after a push, k3_kl between sampler and trainer is .* 4 prompts",
    "with_a_bad_copy": "a copy of the push failed",
    "before_the_pause": "RolloutError: rank 1: ValueError.*pause_scheduler does not want to",
    "before_the_first_exchange": "RolloutError: rank 1: ValueError.*start_weight_update does not want to",
    "with_other_versions": r"RolloutError: ranks have different policy versions: \[2, 3\]",
    "after_a_move": "is not where it was when the push was planned",
    "with_a_wrong_bit": "WeightError: .* engine does not hold the trainer's weights: .*down_proj",
}


@pytest.fixture(scope="module")
def failures(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("failures"))
    results: list[dict[str, Any]] = rollout_world.run(
        failing_pushes, {"folder": folder}, size=2, timeout_s=200
    )
    return results


@pytest.mark.parametrize("failure", ERRORS)
def test_it_fails_on_all_ranks_and_the_engine_refuses_until_the_next_push(
    failures: list[dict[str, Any]], failure: str
) -> None:
    for rank in failures:
        found = rank[failure]
        assert re.search(ERRORS[failure], found["error"])
        assert found["refused"] and found["recovers"]


def test_an_engine_that_was_shut_down_takes_no_weights(failures: list[dict[str, Any]]) -> None:
    assert all("shut down" in rank["shut down"] for rank in failures)


@pytest.fixture(scope="module")
def without(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("without"))
    results: list[dict[str, Any]] = rollout_world.run(without_room, {"folder": folder}, size=2, timeout_s=120)
    return results


def test_a_rank_without_room_to_share_is_an_error_only_where_sharing_is_a_must(
    without: list[dict[str, Any]],
) -> None:
    for found in without:
        assert re.search(r"an engine could not allocate \d+ bytes of shared memory", found["must"])
        assert "rollout.push_transport=auto" in found["must"]
        assert found["with"] == {"transport": "shared_memory", "failed": "", "same": True}
        assert found["without"] == {"transport": "collective", "failed": "", "same": True}
        assert found["remark"].startswith("weights are pushed through buckets: ")
        assert "could not allocate" in found["remark"]
    assert not without[1]["moved"]


def test_a_push_planned_before_weights_were_moved_says_so(without: list[dict[str, Any]]) -> None:
    assert all("is not where it was when the push was planned" in each["an older push"] for each in without)


def test_no_file_stays_open(without: list[dict[str, Any]]) -> None:
    # Rank 0's engine has its weights in a file by then, which stays open and mapped.
    assert [each["left open"] for each in without] == [2, 0]
    assert all(each["open at the end"] <= 0 for each in without)


def test_no_rank_writes_to_an_engine_that_has_not_paused(rollout_world: World, tmp_path: Path) -> None:
    for found in rollout_world.run(late_pause, {"folder": str(tmp_path)}, size=2, timeout_s=120):
        assert found == {"until the pause": True, "after": False}


def test_a_rank_that_dies_leaves_no_engine_with_mixed_weights(rollout_world: World, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="rank 1"):
        rollout_world.run(dying_push, {"folder": str(tmp_path)}, size=2, timeout_s=120)
    met = json.loads((tmp_path / "met.json").read_text())
    assert "the push lost other ranks" in met["error"] and met["refused"]
