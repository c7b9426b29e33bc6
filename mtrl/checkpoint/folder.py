"""The folder of a run's checkpoints: which are there, which is the newest, which may go.

A checkpoint is visible from the one rename that gives it its name, which comes after its last byte is on
disk, until the one rename that takes the name away. Names that begin with a dot are unfinished or half
deleted.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from mtrl.checkpoint.format import MANIFEST, json_bytes, read_json
from mtrl.models.durable import replace_file, sync_folder
from mtrl.parallel.errors import CheckpointError

LATEST = "latest.json"
_STEP = re.compile(r"step_(\d{6,})")
_LEFT_OVER = re.compile(r"\.step_\d{6,}\.(partial|deleted)|\.latest\.json\.\d+\.tmp")


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step_{step:06d}"


def partial_path(folder: Path, step: int) -> Path:
    """Where it is written."""
    return folder / f".step_{step:06d}.partial"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def publish(folder: Path, step: int) -> Path:
    """Give a checkpoint whose files are all on disk its name: from here on it is seen."""
    source, target = partial_path(folder, step), step_path(folder, step)
    for path in (*(path for path in source.iterdir() if path.is_dir()), source):
        sync_folder(path)
    os.rename(source, target)
    return target


def point_latest(folder: Path, step: int) -> None:
    """Write ``latest.json``, once the checkpoint's name is on disk."""
    sync_folder(folder)
    target = step_path(folder, step)
    digest = hashlib.sha256((target / MANIFEST).read_bytes()).hexdigest()
    replace_file(folder / LATEST, json_bytes({"checkpoint": target.name, "manifest_sha256": digest}))


def check_latest(folder: Path) -> None:
    """Check that ``latest.json`` names a checkpoint that is there, as it was.

    It may name an older one than the newest: a run may end between the two renames. None at all is right
    while there is one checkpoint.

    Raises:
        CheckpointError: what it says cannot be.
    """
    path = folder / LATEST
    present = steps(folder)
    if not path.is_file():
        if len(present) > 1:
            raise CheckpointError(f"{path} is missing, beside {len(present)} checkpoints")
        return
    record = read_json(path)
    if json_bytes(record) != path.read_bytes():
        raise CheckpointError(f"{path} is not as it was written")
    match = _STEP.fullmatch(str(record.get("checkpoint")))
    if not match:
        raise CheckpointError(f"{path} names no checkpoint")
    if int(match[1]) not in present:
        raise CheckpointError(f"{path} names {match[0]}, which is missing")
    manifest = folder / match[0] / MANIFEST
    if not manifest.is_file() or record.get("manifest_sha256") != _sha256(manifest):
        raise CheckpointError(f"{path} does not fit {match[0]}/{MANIFEST}: one of the two is damaged")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clean(folder: Path) -> list[str]:
    """Delete what killed runs left unfinished; the names of it."""
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if _LEFT_OVER.fullmatch(path.name))
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in found]


def prune(folder: Path, *, keep_last: int | None, keep_every: int | None) -> None:
    """Delete all checkpoints but the last ``keep_last`` (None: all) and those of multiples of
    ``keep_every``.
    """
    present = steps(folder)
    for step in present[:-keep_last] if keep_last else []:
        if keep_every and step % keep_every == 0:
            continue
        doomed = step_path(folder, step)
        hidden = folder / f".{doomed.name}.deleted"
        os.rename(doomed, hidden)
        sync_folder(folder)
        shutil.rmtree(hidden)
