"""The folder of a run: who may write into it, and how each file in it is written.

::

    output_dir/
      config.yaml         the resolved config
      .lock               held by the run while it goes on
      superseded.jsonl    lines of steps that were made again
      engine/             config and tokenizer for vLLM, RL only
      metrics.jsonl       one JSON object a step
      evaluations.jsonl   one JSON object an evaluation
      tensorboard/        the same numbers as events
      checkpoints/        Hugging Face folders
      summary.json        at the end
      reward.png          at the end, RL only

Opening it comes before any process group, so ranks cannot ask each other. Only rank 0 looks at the
file system and decides; the other ranks look at nothing and wait for rank 0 where they next meet it.
When rank 0 refuses, it exits and torchrun ends the others, so the verdict is one. A look by every rank
would be a race instead: the folder that rank 0 has just made would be refused by the rest. On several
nodes ``output_dir`` must be the same shared folder on all of them.
"""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mtrl.config import Config
from mtrl.models.durable import replace_file
from mtrl.parallel.errors import CheckpointError, ConfigError, DataError, OutputExistsError

_LOCKS: dict[Path, int] = {}
"""Folders this process holds, with their open lock files."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """An opened run folder. Rank 0 writes; on other ranks ``append_*`` and ``write_*`` do nothing."""

    path: Path
    is_writer: bool

    @property
    def metrics_path(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations_path(self) -> Path:
        """One JSON object an evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def summary_path(self) -> Path:
        """What came of the run."""
        return self.path / "summary.json"

    @property
    def plot_path(self) -> Path:
        """Reward and accuracy over steps."""
        return self.path / "reward.png"

    @property
    def tensorboard_path(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints_path(self) -> Path:
        """Hugging Face folders."""
        return self.path / "checkpoints"

    def append_metrics(self, record: Mapping[str, Json]) -> None:
        """Add one line to ``metrics.jsonl``; it is with the operating system on return."""
        self._append(self.metrics_path, record)

    def append_evaluation(self, record: Mapping[str, Json]) -> None:
        """Add one line to ``evaluations.jsonl``, likewise."""
        self._append(self.evaluations_path, record)

    def write_summary(self, summary: Mapping[str, Json]) -> None:
        """Write ``summary.json`` so that a reader sees the old file or all of the new, even after a crash."""
        if self.is_writer:
            text = json.dumps(_finite(dict(summary)), indent=2, allow_nan=False)
            try:
                write_atomically(self.summary_path, text + "\n")
            except OSError as error:
                raise CheckpointError(f"{error.filename} cannot be written: {error.strerror}") from error

    def sync(self, path: Path) -> int:
        """On rank 0: force a ``.jsonl`` file to disk; its size in bytes. 0 elsewhere, and where there is
        none.
        """
        if not self.is_writer or not path.is_file():
            return 0
        with path.open("rb") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise CheckpointError(f"{path} cannot be forced to disk: {error.strerror}") from error
            return os.fstat(file.fileno()).st_size

    def rewind(self, metrics_bytes: int, evaluations_bytes: int) -> None:
        """Cut ``metrics.jsonl`` and ``evaluations.jsonl`` to what they were at a checkpoint.

        What came after goes to ``superseded.jsonl``: the steps are made again.
        """
        for path, num_bytes in (
            (self.metrics_path, metrics_bytes),
            (self.evaluations_path, evaluations_bytes),
        ):
            if not path.is_file():
                continue
            data = path.read_bytes()
            if len(data) > num_bytes:
                with (self.path / "superseded.jsonl").open("ab") as aside:
                    aside.write(data[num_bytes:].rstrip(b"\n") + b"\n")
                    aside.flush()
                    os.fsync(aside.fileno())
                replace_file(path, data[:num_bytes])

    def _append(self, path: Path, record: Mapping[str, Json]) -> None:
        if self.is_writer:
            line = json.dumps(_finite(dict(record)), allow_nan=False) + "\n"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def open_run_folder(config: Config, *, rank: int | None = None) -> RunFolder:
    """Claim ``config.output_dir`` and write ``config.yaml`` into it; ``rank``: RANK unless given.

    Not collective, see the top of the file. Raises OutputExistsError when the folder holds anything and
    ``if_exists`` is refuse, or when it cannot be moved aside; ConfigError when it cannot be made.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    folder = RunFolder(path=Path(config.output_dir), is_writer=rank == 0)
    if folder.is_writer:
        try:
            taken = _is_taken(folder.path)
        except OSError as error:
            raise ConfigError(f"output_dir: {folder.path} cannot be read: {error.strerror}") from error
        if taken and config.if_exists == "resume":
            _reopen(folder.path, config.to_yaml())
        else:
            if taken:
                _check_unlocked(folder.path)
                _make_way(folder.path, config.if_exists == "replace")
            _claim(folder.path, config.to_yaml())
        _lock(folder.path)
    return folder


def read_lines(path: Path) -> list[dict[str, Json]]:
    """The records of a ``.jsonl`` file; [] when there is none. A last line cut by a kill is left out.

    Raises DataError for a file that is damaged elsewhere.
    """
    if not path.exists():
        return []
    try:
        complete = path.read_bytes().split(b"\n")[:-1]
        records = [json.loads(line) for line in complete]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: a line before the last is not JSON ({error}); it was damaged") from error
    if not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: a line holds no JSON object; it was damaged")
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old file or all of the new, even after a crash."""
    replace_file(path, text.encode())


def _is_taken(path: Path) -> bool:
    """Whether anything but an empty folder stands there."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _make_way(path: Path, may_replace: bool) -> None:
    aside = _free_name(path)
    if not may_replace:
        raise OutputExistsError(
            f"output_dir: {path} exists and is not an empty folder; write output_dir=ANOTHER_FOLDER, "
            f"or if_exists=replace, which moves the old one to {aside.name} and deletes nothing"
        )
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputExistsError(
            f"output_dir: {path} holds the current folder {Path.cwd()}, so it is not moved aside; "
            "write output_dir=ANOTHER_FOLDER"
        )
    try:
        path.rename(aside)
    except OSError as error:
        raise OutputExistsError(
            f"output_dir: {path} cannot be moved aside to {aside.name}: {error.strerror}"
        ) from error


def _reopen(path: Path, config_yaml: str) -> None:
    """Give a run's folder the config it now goes on with; the one before stays in its checkpoints."""
    if not (path / "config.yaml").is_file():
        raise OutputExistsError(
            f"output_dir: {path} is not empty and has no config.yaml, so it is no run to resume; write "
            "output_dir=ANOTHER_FOLDER, or if_exists=replace, which moves it aside"
        )
    _lock(path)
    try:
        write_atomically(path / "config.yaml", config_yaml)
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be written to: {error.strerror}") from error


def _check_unlocked(path: Path) -> None:
    """Raise OutputExistsError if a run that still goes on holds the folder."""
    if (path / ".lock").is_file():
        _lock(path)
        os.close(_LOCKS.pop(path.resolve()))


def _lock(path: Path) -> None:
    """Hold the run's folder until this process ends, however it ends.

    Raises OutputExistsError while another process holds it.
    """
    resolved = path.resolve()
    if resolved in _LOCKS:
        return
    try:
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputExistsError(
            f"output_dir: {path} belongs to a run that is still going; wait for it, stop it, or write "
            "output_dir=ANOTHER_FOLDER"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without locks: two runs on one folder are then not noticed.
    _LOCKS[resolved] = descriptor


def _free_name(path: Path) -> Path:
    """``NAME.replaced-20261120T093000``, with ``-2``, ``-3`` ... when that second is taken."""
    stem = f"{path.absolute().name}.replaced-{time.strftime('%Y%m%dT%H%M%S')}"
    candidate, number = path.absolute().with_name(stem), 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.absolute().with_name(f"{stem}-{number}")
    return candidate


def _claim(path: Path, config_yaml: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        # "x" fails when the file is there: of two runs started at once on one folder, one is refused.
        with (path / "config.yaml").open("x", encoding="utf-8") as file:
            file.write(config_yaml)
    except FileExistsError as error:
        raise OutputExistsError(
            f"output_dir: {path} was taken by another run just now; write output_dir=ANOTHER_FOLDER"
        ) from error
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be made or written to: {error.strerror}") from error


def _finite(value: Json) -> Json:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_finite(below) for below in value]
    return value
