"""Going on: which checkpoint a run continues from, whether the config still fits it, what is put back.

The layout, the number of ranks and Megatron's version may differ from those that wrote it. Under the same
layout a run goes on bit for bit as if it had never stopped.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtrl.checkpoint.folder import LATEST, clean, point_latest, step_path, steps
from mtrl.checkpoint.format import RUN_CONFIG, PhaseName, RunState, read_json
from mtrl.checkpoint.load import newest_whole
from mtrl.config import Config
from mtrl.data.order import DataCursor
from mtrl.parallel.agreement import agree, gather_json
from mtrl.parallel.errors import CheckpointError
from mtrl.preflight import Job
from mtrl.resume_check import check_fits
from mtrl.run_folder import RunFolder

MAY_CHANGE = ("if_exists", "checkpoint.", "logging.")
"""Keys whose change is not worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where training stands: ``step`` steps of ``phase`` are done, ``cursor`` is what comes next of its
    data.
    """

    phase: PhaseName
    step: int
    cursor: DataCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The checkpoint a run goes on from, and what is to be told about it."""

    checkpoint: Path
    state: RunState
    messages: tuple[str, ...]

    @property
    def position(self) -> Position:
        """Where it stood."""
        return Position(phase=self.state.phase, step=self.state.phase_step, cursor=self.state.cursor)


def find(job: Job, folder: RunFolder) -> Resumed | None:
    """The checkpoint to go on from: None for a run that begins. Collective over WORLD.

    What killed runs left unfinished is deleted, damaged checkpoints that are passed over are renamed, and the
    lines of metrics after the checkpoint are moved aside.

    Raises:
        CheckpointError: the newest checkpoint is damaged and ``checkpoint.on_damage`` is refuse.
        ConfigError: the config does not fit it.
    """
    config, checkpoints = job.config, folder.checkpoints_path
    if config.if_exists != "resume":
        return None
    left_over: list[str] = []
    agree(_on_writer(folder, lambda: left_over.extend(clean(checkpoints))))
    messages = [f"deleted what a stopped run left unfinished: {name}" for name in left_over]
    if not gather_json(steps(checkpoints))[0]:
        if (checkpoints / LATEST).exists():
            raise CheckpointError(
                f"{checkpoints} has {LATEST} and none of the checkpoints it speaks of; bring them back, or "
                "start anew with if_exists=replace, which moves the folder aside"
            )
        agree(_on_writer(folder, lambda: _forget(folder, 0, 0)))
        return None
    checkpoint, damaged = newest_whole(checkpoints, may_go_back=config.checkpoint.on_damage == "previous")
    state = RunState.read(checkpoint)
    check_fits(job, checkpoint, state)

    def rewind() -> None:
        _put_aside(checkpoints, state.step)
        point_latest(checkpoints, state.step)
        _forget(folder, state.metrics_bytes, state.evaluations_bytes)

    agree(_on_writer(folder, rewind))
    messages += [f"passed over: {each}" for each in damaged]
    messages += _changes(config, checkpoint)
    return Resumed(checkpoint=checkpoint, state=state, messages=tuple(messages))


def _on_writer(folder: RunFolder, action: Callable[[], object]) -> OSError | None:
    """Do something on rank 0 alone; what it met."""
    if folder.is_writer:
        try:
            action()
        except OSError as error:
            return error
    return None


def _forget(folder: RunFolder, metrics_bytes: int, evaluations_bytes: int) -> None:
    """Take away what says that more steps were made than the checkpoint has."""
    folder.rewind(metrics_bytes, evaluations_bytes)
    folder.summary_path.unlink(missing_ok=True)
    for path in folder.path.glob(".*.tmp"):
        path.unlink()


def _put_aside(checkpoints: Path, step: int) -> None:
    """Rename damaged checkpoints after ``step``: training is about to write those steps anew."""
    for each in steps(checkpoints):
        if each > step:
            path, number = step_path(checkpoints, each), 1
            while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
                number += 1
            path.rename(aside)


def _changes(config: Config, checkpoint: Path) -> list[str]:
    """What the config says otherwise than when the checkpoint was written."""
    then, now = dict(_flat(read_json(checkpoint / RUN_CONFIG))), dict(_flat(asdict(config)))
    return [
        f"{key}: {then.get(key)} when the checkpoint was written, now {now.get(key)}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
