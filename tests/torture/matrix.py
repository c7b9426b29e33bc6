"""What the torture runs: jobs under layouts, what is tried at which point, and what must hold."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrl.checkpoint.folder import LATEST, step_path, steps
from mtrl.checkpoint.format import MANIFEST, Manifest, problems
from mtrl.checkpoint.load import newest_whole
from mtrl.parallel.errors import CheckpointError
from tests.distributed.world import World, WorldError
from tests.e2e.jobs import lines, untimed
from tests.e2e.toy import write_toy
from tests.torture.faults import run_with

TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A small run that saves after every step."""

    name: str
    size: int
    arguments: tuple[str, ...]

    @property
    def is_rl(self) -> bool:
        """Whether it samples with vLLM, which takes longer to start."""
        return self.arguments[0] == "grpo.yaml"


def _sft(name: str, spec: str, size: int, *options: str) -> Job:
    arguments = ("sft.yaml", f"actor.backend={spec}", "algorithm.total_steps=2", "checkpoint.every_steps=1")
    return Job(name=name, size=size, arguments=(*arguments, "logging.tensorboard=false", *options))


THREE_STEPS = ("algorithm.total_steps=3", "checkpoint.keep_last=2")

JOBS = (
    _sft("experts over two", "megatron:(attn:d2|ffn:e2)", 2, *THREE_STEPS),
    _sft("tensor parallel", "megatron:(attn:t2|ffn:t2)", 2, "actor.optimizer.distributed=false"),
    _sft("pipeline in the background", "megatron:p2", 2, "checkpoint.asynchronous=true"),
    _sft("folded on four", "megatron:(attn:d2t2|ffn:t2e2)", 4, "model.precision=bf16"),
    Job(
        name="grpo",
        size=2,
        arguments=(
            "grpo.yaml", "algorithm.total_steps=2", "algorithm.warm_start.total_steps=2",
            "checkpoint.every_steps=1", "algorithm.kl_coef=0.01", "logging.tensorboard=false",
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fault: ``action`` on ``rank`` at its point ``number``, which is ``what``."""

    job: str
    rank: int
    number: int
    what: str
    action: str

    def __str__(self) -> str:
        return f"{self.job}: {self.action} on rank {self.rank} at {self.number}: {self.what}"


class Torture:
    """Runs trials of one job in a folder, in one world."""

    def __init__(self, world: World, folder: Path, job: Job) -> None:
        self.world, self.folder, self.job = world, folder / job.name.replace(" ", "_"), job
        self.folder.mkdir(parents=True)
        write_toy(self.folder)
        self.points = [rank["points"] for rank in self._run("straight", ())]
        self.expected = self._left("straight")

    def trials(self) -> Iterator[Trial]:
        """Every point of every rank: a kill, of one rank and of all in turn, and the failures that fit it."""
        for rank, points in enumerate(self.points):
            for number, what in enumerate(points):
                actions = ["kill all" if number % 2 else "kill"]
                if what.startswith("write"):
                    actions += ["half", "ENOSPC" if number % 4 < 2 else "EIO"]
                elif what.startswith(("fsync", "rename", "replace")):
                    actions += ["EIO"]
                for action in actions:
                    yield Trial(job=self.job.name, rank=rank, number=number, what=what, action=action)

    def damages(self) -> Iterator[tuple[str, str, str]]:
        """Each file of the newest checkpoint in each way once: (file, way, what went wrong or nothing)."""
        run = self.folder / "runs" / "straight" / "checkpoints"
        newest, previous = (step_path(run, step) for step in reversed(steps(run)[-2:]))
        names = [*(record.name for record in Manifest.read(newest).files), MANIFEST]
        for path in [*(newest / name for name in names), run / LATEST]:
            content, where = path.read_bytes(), path.relative_to(run)
            stale = previous / path.relative_to(newest) if path.is_relative_to(newest) else None
            ways = {
                "truncated": content[: len(content) // 2],
                "bit flipped": _flipped(content),
                "removed": None,
                "emptied": b"",
                "replaced by a stale one": stale.read_bytes() if stale and stale.exists() else content,
            }
            for way, bad in ways.items():
                if bad == content:
                    continue  # the same in both checkpoints
                path.unlink() if bad is None else path.write_bytes(bad)
                yield str(where), way, _missed(run, newest, previous, path)
                path.write_bytes(content)

    def run(self, trial: Trial) -> str:
        """What went wrong in this trial; empty if all that must hold does."""
        name, story = "trial", ""
        shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        try:
            self._run(name, (), trial)
        except WorldError as error:
            story = str(error)
        if "the process that starts ranks ended" in story:
            raise RuntimeError(f"{trial} has no result, for what should have run it died: {story}")
        if not story:
            return "the fault did not end the run"
        if trial.action.startswith("E") and "CheckpointError" not in story:
            print(story)  # with paths of this machine, which no result may hold
            return "the error is not told"
        checkpoints = self.folder / "runs" / name / "checkpoints"
        for step in steps(checkpoints):
            if f"the checkpoint of step {step} could not be written" in story:
                return f"step {step} is visible and said not to be written"
            path = step_path(checkpoints, step)
            if wrong := problems(path, Manifest.read(path).files):
                return f"{path.name} is visible and not whole: {wrong}"
        try:
            self._run(name, ("if_exists=resume",))
        except WorldError as error:
            print(error)
            return "it does not resume"
        return self._compare(name)

    def _compare(self, name: str) -> str:
        left = self._left(name)
        for key, value in self.expected.items():
            if left.get(key) != value:
                return f"{key} differs from the run that never stopped: {left.get(key)} for {value}"
        checkpoints = self.folder / "runs" / name / "checkpoints"
        try:
            newest_whole(checkpoints, may_go_back=False)
        except CheckpointError as error:
            return f"it would not resume again: {error}"
        hidden = [path.name for path in checkpoints.glob(".*")]
        return f"left over: {hidden}" if hidden else ""

    def _run(self, name: str, options: tuple[str, ...], trial: Trial | None = None) -> list[dict[str, Any]]:
        pids = self.folder / "pids"
        shutil.rmtree(pids, ignore_errors=True)
        arguments = {
            "folder": str(self.folder),
            "arguments": [*self.job.arguments, f"output_dir=runs/{name}", *options],
            "rank": trial.rank if trial else -1,
            "number": trial.number if trial else -1,
            "action": trial.action if trial else "count",
            "pids": str(pids),
        }
        return self.world.run(run_with, arguments, size=self.job.size, timeout_s=TIMEOUT_S, start=False)

    def _left(self, name: str) -> dict[str, Any]:
        """What a run left that must not depend on whether it was stopped: metrics, weights, optimizer."""
        run = self.folder / "runs" / name
        checkpoint = step_path(run / "checkpoints", steps(run / "checkpoints")[-1])
        files = {
            record.name: record.sha256
            for record in Manifest.read(checkpoint).files
            if not record.name.endswith(("state.json", "training/config.json"))
        }
        evaluations = run / "evaluations.jsonl"
        accuracy = {
            key: value
            for key, value in json.loads((run / "summary.json").read_text()).items()
            if key.startswith("accuracy")
        }
        return {
            "steps": steps(run / "checkpoints"),
            "metrics": untimed(lines(run / "metrics.jsonl")),
            "evaluations": untimed(lines(evaluations)) if evaluations.exists() else [],
            "accuracy": accuracy,
            **files,
        }


def _flipped(content: bytes) -> bytes:
    """One bit is another, somewhere."""
    bit = random.Random(len(content)).randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _missed(run: Path, newest: Path, previous: Path, damaged: Path) -> str:
    """What is wrong with how a damaged file is met: it must be named, and the one before be offered."""
    try:
        newest_whole(run, may_go_back=False)
    except CheckpointError as error:
        if damaged.name not in str(error):
            return f"{damaged.name} is not named: {error}"
    else:
        return "it was not noticed"
    found, told = newest_whole(run, may_go_back=True)
    expected = previous if damaged.is_relative_to(newest) else newest
    if found != expected or not any(damaged.name in each for each in told):
        return f"went on from {found.name}, told {told}"
    return ""
