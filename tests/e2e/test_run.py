"""A run from its command line to its last file, twice: what it shows, leaves, and repeats."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtrl.config_load import load_config
from tests.distributed.world import World
from tests.e2e.jobs import Finished, lines, run_main, untimed

pytestmark = pytest.mark.vllm

NUM_SFT, NUM_GRPO = 4, 3


@pytest.fixture(scope="module")
def run(toy: Path, grpo: Finished) -> Path:
    assert grpo.status == 0, grpo.err
    return toy / "runs" / "grpo"


@pytest.fixture(scope="module")
def steps(run: Path) -> list[dict[str, Any]]:
    return lines(run / "metrics.jsonl")


@pytest.fixture(scope="module")
def again(world: World, toy: Path) -> Path:
    """The same in forks, while the user's reward reseeds every global generator of rank 0, and its engines
    have processes of their own.
    """
    arguments = ["grpo.yaml", "output_dir=runs/again", "reward.name=rewards:reseeding", "rollout.process=own"]
    world.run(run_main, {"folder": str(toy), "arguments": arguments}, size=2, start=False, timeout_s=200)
    return toy / "runs" / "again"


def test_the_terminal_shows_the_run_and_nothing_else(grpo: Finished) -> None:
    assert grpo.err == ""
    shown = grpo.out.splitlines()
    assert shown[0].startswith("held-out accuracy after step 0: ")
    assert any(line.startswith("sft 4/4  loss ") for line in shown)
    assert any(line.startswith("grpo 3/3  reward ") for line in shown)
    assert "model:  runs/grpo/checkpoints/step_000007" in shown
    assert any(line.startswith("  python tools/generate.py --model runs/grpo/checkpoints") for line in shown)


def test_a_run_leaves_its_files(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "reward.png"}
    assert wanted | {"checkpoints", "tensorboard"} <= names
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest.json", "step_000007"]
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_the_config_it_leaves_starts_the_same_run(run: Path, toy: Path) -> None:
    assert load_config(run / "config.yaml") == load_config(toy / "grpo.yaml")


def test_every_step_is_a_line_with_the_documented_keys(steps: list[dict[str, Any]]) -> None:
    assert [each["step"] for each in steps] == list(range(1, NUM_SFT + NUM_GRPO + 1))
    assert [each["phase"] for each in steps] == ["sft"] * NUM_SFT + ["grpo"] * NUM_GRPO
    every = {"step", "loss", "grad_norm", "lr", "num_tokens", "train_s", "step_s"}
    sampled = {"reward_mean", "completion_length_mean", "logprob_abs_diff_max", "k3_kl", "policy_version"}
    timed = {"push_bytes_received", "generate_s", "reward_s", "logprobs_s", "push_s"}
    for each in steps:
        assert every <= each.keys()
    for each in steps[NUM_SFT:]:
        assert sampled | timed <= each.keys()


def test_sampler_and_trainer_agree_on_every_step(steps: list[dict[str, Any]]) -> None:
    for each in steps[NUM_SFT:]:
        assert each["logprob_abs_diff_max"] <= 1e-5 and each["k3_kl"] <= 1e-6
        assert each["logprob_mismatch_share"] == 0.0


def test_every_update_is_sampled_from_under_a_version_of_its_own(steps: list[dict[str, Any]]) -> None:
    # Version 1 is evaluated before the warm start, 2 after it and sampled by the first step of GRPO.
    assert [each["policy_version"] for each in steps[NUM_SFT:]] == [2, 3, 4]
    assert len({each["push_bytes_received"] for each in steps[NUM_SFT:]}) == 1
    assert steps[-1]["push_bytes_received"] > 0


def test_the_summary_says_what_came_of_it(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("accuracy_before", "accuracy_after_sft", "accuracy_after_grpo"):
        assert 0.0 <= summary[name] <= 1.0
    assert (summary["num_eval_prompts"], summary["num_steps"]) == (5, NUM_SFT + NUM_GRPO)
    assert summary["seconds_total"] > 0 and summary["peak_memory_bytes"] > 2**28
    assert summary["model_path"] == "runs/grpo/checkpoints/step_000007"
    assert [each["step"] for each in lines(run / "evaluations.jsonl")] == [0, NUM_SFT, NUM_SFT + NUM_GRPO]


def test_a_run_repeats_exactly_whatever_generators_draw_and_wherever_vllm_lives(
    run: Path, again: Path
) -> None:
    assert json.loads((again / "summary.json").read_text())["uses"]["sampler_process"] == "own"
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert untimed(lines(run / name)) == untimed(lines(again / name))
    weights = "checkpoints/step_000007/model.safetensors"
    assert (run / weights).read_bytes() == (again / weights).read_bytes()
