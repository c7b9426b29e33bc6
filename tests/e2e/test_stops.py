"""What a person sees of a run that was refused or stopped: the error, once, and the exit status."""

import re
from pathlib import Path

import pytest

from tests.distributed.world import World
from tests.e2e.jobs import ROOT, TRAIN, forked, python, torchrun


def own_lines(text: str) -> list[str]:
    """What comes before torchrun's own report."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("Traceback") or (line[:1] in "WE" and "torch/distributed/elastic" in line):
            break
        found.append(line)
    return found


def test_a_refusal_is_told_once_by_all_ranks_together(toy: Path) -> None:
    done = torchrun(toy, "sft.yaml", "output_dir=runs/refused", "actor.backend=megatron:d3")
    assert done.status != 0 and done.out == ""
    assert own_lines(done.err) == [
        "LayoutError: actor.backend: megatron:d3 needs 3 ranks and 2 were started; start it with",
        "  torchrun --nproc-per-node 3 mtrl/train.py CONFIG",
        "or write a spec of 2 ranks, such as megatron:d2",
    ]
    assert "exitcode  : 2" in done.err and "traceback : LayoutError: actor.backend" in done.err
    assert not (toy / "runs" / "refused").exists()


def test_without_torchrun_a_refusal_is_all_there_is(toy: Path) -> None:
    done = python(toy, TRAIN, "sft.yaml", "actor.backend=megatron:d1", "algorithm.total_step=3")
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines() == [
        "ConfigError: command line: section 'algorithm' has no key 'total_step'; did you mean "
        "'algorithm.total_steps'?"
    ]


def test_a_dry_run_prints_the_config_and_starts_nothing(toy: Path) -> None:
    arguments = ("--dry-run", "output_dir=runs/dry", "actor.backend=megatron:d1")
    done = python(toy, TRAIN, "sft.yaml", *arguments)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "# checked: megatron:d1 fits qwen3_moe; nothing was started"
    assert "samples_per_step: 6" in done.out and not (toy / "runs" / "dry").exists()


def test_an_output_folder_that_holds_something_is_refused_and_kept(world: World, toy: Path) -> None:
    before = sorted((toy / "task").iterdir())
    done = forked(world, toy, "mtrl.train", "sft.yaml", "actor.backend=megatron:d1", "output_dir=task")
    assert done.status == 2
    assert done.err.startswith("OutputExistsError: output_dir: task exists and is not an empty folder; write")
    assert sorted((toy / "task").iterdir()) == before


@pytest.mark.vllm
def test_a_mismatch_above_its_bound_stops_the_run(toy: Path) -> None:
    done = torchrun(
        toy, "grpo.yaml", "output_dir=runs/mismatch", "algorithm.max_k3_kl=1e-30",
        "algorithm.warm_start=null", "data.warm_start=null", ours=True,
    )  # fmt: skip
    assert done.status == 2, done.err
    assert re.fullmatch(r"MismatchError: step 1: k3_kl between sampler and trainer is [^\n]*\n", done.err)
    assert not (toy / "runs" / "mismatch" / "summary.json").exists()


def test_our_torchrun_reports_a_process_that_died_without_words(toy: Path, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node=1", str(script)]
    done = python(tmp_path, str(ROOT / "scripts" / "torchrun.py"), *launch)
    assert done.status == 1 and "Signal 9 (SIGKILL) received" in done.err and "Traceback" not in done.err
