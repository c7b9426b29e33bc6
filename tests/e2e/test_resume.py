"""A run goes on from its newest checkpoint: what the user types, sees and finds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from tests.distributed.world import World, WorldError
from tests.e2e.jobs import ROOT, TRAIN, forked, lines, run_main, untimed

OPTIONS = ("algorithm.total_steps=4", "checkpoint.every_steps=1")


def sft(world: World, toy: Path, name: str, *options: str, size: int = 2) -> None:
    arguments = {"folder": str(toy), "arguments": ["sft.yaml", f"output_dir=runs/{name}", *OPTIONS, *options]}
    world.run(run_main, arguments, size=size, start=False)


@pytest.fixture(scope="module")
def straight(world: World, toy: Path) -> Path:
    """A run of four steps that saved after each."""
    sft(world, toy, "straight")
    return toy / "runs" / "straight"


def copy_of(run: Path, name: str, *, steps: int) -> Path:
    """That run as it was after ``steps``."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for path in copy.glob("checkpoints/step_*"):
        if int(path.name[-6:]) > steps:
            shutil.rmtree(path)
    (copy / "checkpoints" / "latest.json").unlink()
    if steps > 1:
        write_latest(copy / "checkpoints", steps)
    (copy / "summary.json").unlink()
    return copy


def write_latest(checkpoints: Path, step: int) -> None:
    from mtrl.checkpoint.folder import point_latest

    point_latest(checkpoints, step)


def weights(run: Path) -> dict[str, str]:
    manifest = json.loads((run / "checkpoints" / "step_000004" / "manifest.json").read_text())
    return {
        name: entry["sha256"]
        for name, entry in manifest["files"].items()
        if name.endswith("safetensors") and "rng" not in name
    }


def test_going_on_gives_the_same_metrics_and_bytes(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "again", steps=2)
    sft(world, toy, "again", "if_exists=resume")
    assert untimed(lines(run / "metrics.jsonl")) == untimed(lines(straight / "metrics.jsonl"))
    assert weights(run) == weights(straight)
    assert [each["step"] for each in lines(run / "superseded.jsonl")] == [3, 4]
    assert (run / "summary.json").is_file()


def test_another_layout_goes_on_within_rounding(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "elsewhere", steps=2)
    sft(world, toy, "elsewhere", "if_exists=resume", "actor.backend=megatron:d1", size=1)
    found, expected = lines(run / "metrics.jsonl"), lines(straight / "metrics.jsonl")
    assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in expected], rel=1e-6)


def test_a_longer_schedule_goes_on_from_the_end(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "longer", steps=4)
    sft(world, toy, "longer", "if_exists=resume", "algorithm.total_steps=5")
    assert [each["step"] for each in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_resuming_a_run_that_is_done_changes_nothing(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "done", steps=4)
    before = (run / "metrics.jsonl").read_text()
    sft(world, toy, "done", "if_exists=resume")
    assert (run / "metrics.jsonl").read_text() == before and (run / "summary.json").is_file()


def test_a_run_without_a_checkpoint_starts_from_the_start(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "killed_early", steps=0)
    (run / "checkpoints" / ".step_000001.partial").mkdir()
    sft(world, toy, "killed_early", "if_exists=resume")
    assert untimed(lines(run / "metrics.jsonl")) == untimed(lines(straight / "metrics.jsonl"))
    assert weights(run) == weights(straight)
    assert not list((run / "checkpoints").glob(".*"))


def refusal(world: World, toy: Path, name: str, *options: str) -> str:
    """What is said before anything starts, on one rank, whose layout fits any checkpoint."""
    layout = ("if_exists=resume", "actor.backend=megatron:d1")
    arguments = ("sft.yaml", f"output_dir=runs/{name}", *OPTIONS, *layout, *options)
    done = forked(world, toy, "mtrl.train", *arguments)
    assert (done.status, done.out) == (2, "")
    return done.err


def test_what_does_not_fit_the_checkpoint_is_refused(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "unfit", steps=2)
    before = (run / "config.yaml").read_text()
    told = refusal(world, toy, "unfit", "seed=7")
    assert told.startswith(
        "ConfigError: seed: given 7, but runs/unfit/checkpoints/step_000002 was written with"
    )
    told = refusal(world, toy, "unfit", "model.precision=bf16")
    assert "model.precision: given bf16, but" in told and "was written with fp32" in told
    told = refusal(world, toy, "unfit", "data.train=task/train_short.jsonl")
    assert "data.train: has 12 records, had 24" in told
    assert (run / "config.yaml").read_text() == before


@pytest.fixture(scope="module", autouse=True)
def short_data(toy: Path) -> None:
    records = (toy / "task" / "sft.jsonl").read_text().splitlines(keepends=True)
    (toy / "task" / "train_short.jsonl").write_text("".join(records[:12]))


def test_weights_alone_are_no_place_to_go_on_from(world: World, toy: Path) -> None:
    sft(world, toy, "weights", "checkpoint.contents=weights", "algorithm.total_steps=1")
    assert not list((toy / "runs" / "weights").glob("checkpoints/*/training/optimizer*"))
    told = refusal(world, toy, "weights")
    assert "checkpoint.contents=weights" in told and "model.path=runs/weights/checkpoints/step_000001" in told


def test_a_damaged_checkpoint_is_refused_or_passed_over(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "damaged", steps=3)
    victim = run / "checkpoints" / "step_000003" / "training" / "optimizer-00001-of-00002.safetensors"
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(WorldError) as raised:
        sft(world, toy, "damaged", "if_exists=resume")
    told = str(raised.value)
    assert "training/optimizer-00001-of-00002.safetensors has" in told
    assert "the newest whole one is step_000002" in told and "checkpoint.on_damage=previous" in told
    sft(world, toy, "damaged", "if_exists=resume", "checkpoint.on_damage=previous")
    assert weights(run) == weights(straight)
    assert (run / "checkpoints" / "step_000003.damaged-1").is_dir()


def test_going_back_is_done_once(world: World, toy: Path, straight: Path) -> None:
    """The damaged one is out of the way, and nothing speaks of it, even if nothing was saved after."""
    from mtrl.checkpoint.load import newest_whole

    run = copy_of(straight, "back", steps=3)
    (run / "checkpoints" / "step_000003" / "config.json").write_text("{}")
    resume = ("if_exists=resume", "checkpoint.on_damage=previous", "algorithm.total_steps=2")
    sft(world, toy, "back", *resume)
    assert newest_whole(run / "checkpoints", may_go_back=False)[0].name == "step_000002"


def test_checkpoints_that_are_gone_are_not_taken_for_none(toy: Path, straight: Path, world: World) -> None:
    run = copy_of(straight, "gone", steps=2)
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(WorldError, match=r"has latest\.json and none of the checkpoints it speaks of"):
        sft(world, toy, "gone", "if_exists=resume", "actor.backend=megatron:d1", size=1)
    assert (run / "metrics.jsonl").read_text() == before


def test_damage_is_not_taken_for_a_config_that_does_not_fit(world: World, toy: Path, straight: Path) -> None:
    run = copy_of(straight, "digit", steps=2)
    state = run / "checkpoints" / "step_000002" / "training" / "state.json"
    state.write_text(state.read_text().replace('"seed": 1', '"seed": 3'))
    with pytest.raises(WorldError) as raised:
        sft(world, toy, "digit", "if_exists=resume", "actor.backend=megatron:d1", size=1)
    assert "training/state.json is not what was written" in str(raised.value)


def test_routers_unfrozen_find_no_state_and_say_so(world: World, toy: Path) -> None:
    alone = "actor.backend=megatron:d1"
    sft(world, toy, "frozen", "actor.router.freeze=true", "algorithm.total_steps=1", alone, size=1)
    with pytest.raises(WorldError, match=r"lacks \d+ of \d+ elements of exp_avg of .*mlp\.gate\.weight"):
        sft(world, toy, "frozen", "if_exists=resume", alone, size=1)


def test_a_folder_that_is_no_run_is_not_resumed(world: World, toy: Path) -> None:
    arguments = ("sft.yaml", "output_dir=task", "if_exists=resume", "actor.backend=megatron:d1")
    done = forked(world, toy, "mtrl.train", *arguments)
    assert done.status == 2
    assert "task is not empty and has no config.yaml, so it is no run to resume" in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_and_ends_well(toy: Path, number: signal.Signals) -> None:
    name = f"asked_{number.name}"
    command = [
        sys.executable, TRAIN, "sft.yaml", f"output_dir=runs/{name}", "actor.backend=megatron:d1",
        "algorithm.total_steps=100000",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=toy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = toy / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    last = lines(metrics)[-1]["step"]
    assert f"stopped after step {last}, as asked, with a checkpoint" in out
    assert (toy / "runs" / name / "checkpoints" / f"step_{last:06d}" / "manifest.json").is_file()


def test_a_run_still_going_is_not_resumed_beside_itself(world: World, toy: Path, straight: Path) -> None:
    import fcntl

    run = copy_of(straight, "held", steps=2)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = ("mtrl.train", "sft.yaml", "output_dir=runs/held", "actor.backend=megatron:d1")
        done = [forked(world, toy, *arguments, f"if_exists={choice}") for choice in ("resume", "replace")]
    for each in done:
        assert each.status == 2
        assert "runs/held belongs to a run that is still going" in each.err
    assert run.is_dir()


def test_the_json_files_are_as_their_schemas_say(straight: Path) -> None:
    checkpoints = straight / "checkpoints"
    for name, path in (
        ("latest", checkpoints / "latest.json"),
        ("manifest", checkpoints / "step_000004" / "manifest.json"),
        ("state", checkpoints / "step_000004" / "training" / "state.json"),
    ):
        schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(json.loads(path.read_text()), schema)


def test_transformers_opens_a_checkpoint_as_it_is(straight: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight / "checkpoints" / "step_000004"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "qwen3_moe"
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None


@pytest.mark.vllm
def test_a_penalty_without_its_reference_is_refused_before_anything_starts(
    world: World, toy: Path, checkpoint: Path
) -> None:
    run = checkpoint.parents[1]
    shutil.copytree(run, run.with_name("penalty"))
    done = forked(
        world, toy, "mtrl.train", "grpo.yaml", "output_dir=runs/penalty", "if_exists=resume",
        "algorithm.kl_coef=0.1", "actor.backend=megatron:d1", "rollout.backend=vllm:d1",
    )  # fmt: skip
    assert done.status == 2
    assert "algorithm.kl_coef: given 0.1, but runs/penalty/checkpoints/reference is not there" in done.err
