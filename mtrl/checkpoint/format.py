"""What a checkpoint folder is made of: names, the manifest, the state of a run. ``docs/checkpoint.md``
specifies it.

::

    checkpoints/
      latest.json                  the newest step
      step_000240/                 a Hugging Face folder that transformers and vLLM open
        config.json model*.safetensors tokenizer...
        manifest.json              size and SHA-256 of every other file
        training/
          state.json               where the run stood
          config.json              the run's config
          optimizer-R-of-N.safetensors    boxes of masters and moments
          rng-R-of-N.safetensors          generators of rank R
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mtrl.data.order import DataCursor
from mtrl.models.durable import FileRecord, hash_file
from mtrl.parallel.errors import CheckpointError

FORMAT, VERSION = "mtrl checkpoint", 1
MANIFEST = "manifest.json"
STATE = "training/state.json"
RUN_CONFIG = "training/config.json"
REFERENCE = "reference"

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What is taken along of a model's folder besides config and weights: tokenizer, chat template,
generation.
"""

PhaseName = Literal["warm_start", "main"]


def rank_file(kind: str, rank: int, world_size: int) -> str:
    """Name of a rank's file of a kind, ``optimizer``, ``rng`` or ``fp8``.

    >>> rank_file("rng", 3, 8)
    'training/rng-00003-of-00008.safetensors'
    """
    return f"training/{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stood when its checkpoint was written.

    ``step`` counts over all phases, ``phase_step`` within ``phase``; ``num_records``, ``epoch`` and ``index``
    are the position in the phase's data. ``optimizer_steps`` and ``scheduler_steps`` are Adam's and the
    learning rate's counts; ``num_optimizer_tensors`` the Hugging Face tensors with optimizer state, 0 where
    it was left out. ``metrics_bytes`` and ``evaluations_bytes`` are the sizes of the run's files then.
    """

    step: int
    phase: PhaseName
    phase_step: int
    num_records: int
    seed: int
    epoch: int
    index: int
    optimizer_steps: int
    scheduler_steps: int
    num_optimizer_tensors: int
    policy_version: int
    spec: str
    world_size: int
    precision: str
    metrics_bytes: int
    evaluations_bytes: int
    summary: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def cursor(self) -> DataCursor:
        """The position in the phase's data."""
        return DataCursor(num_records=self.num_records, seed=self.seed, epoch=self.epoch, index=self.index)

    def to_json(self) -> bytes:
        """The content of ``state.json``."""
        return json_bytes({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, checkpoint: Path) -> "RunState":
        """The state in a checkpoint.

        Raises:
            CheckpointError: there is none, it is of another version, or a key is missing or of another type.
        """
        path = checkpoint / STATE
        record = read_json(path)
        _check_version(path, record)
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = record.get(field.name)
            kind = field.type if field.type in (int, str) else str if field.name == "phase" else dict
            assert isinstance(kind, type)
            if type(value) is not kind:
                raise CheckpointError(f"{path}: {field.name} is {value!r}, needs {kind.__name__}")
            values[field.name] = value
        if values["phase"] not in ("warm_start", "main"):
            raise CheckpointError(f"{path}: phase is {values['phase']!r}, needs warm_start or main")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Every file of a checkpoint but the manifest itself."""

    step: int
    files: tuple[FileRecord, ...]

    def to_json(self) -> bytes:
        """The content of ``manifest.json``, which ends with a checksum of itself."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {
                record.name: {"bytes": record.num_bytes, "sha256": record.sha256} for record in self.files
            },
        }
        return json_bytes(body | {"sha256": _digest(body)})

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: it is missing, damaged, of another version, or names a file outside the folder.
        """
        path = checkpoint / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {checkpoint} is no whole checkpoint")
        record = read_json(path)
        _check_version(path, record)
        body = {key: value for key, value in record.items() if key != "sha256"}
        try:
            if record.get("sha256") != _digest(body) or json_bytes(record) != path.read_bytes():
                raise CheckpointError(f"{path} is damaged: its own checksum does not fit")
            files = tuple(
                FileRecord(name=name, num_bytes=entry["bytes"], sha256=entry["sha256"])
                for name, entry in record["files"].items()
            )
            step = int(record["step"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is no manifest: {error!r}") from error
        for each in files:
            if Path(each.name).is_absolute() or ".." in Path(each.name).parts:
                raise CheckpointError(f"{path} names {each.name!r}, which is outside the checkpoint")
        return cls(step=step, files=files)


def problems(checkpoint: Path, records: Sequence[FileRecord]) -> list[str]:
    """What is wrong with these files of a checkpoint: a file each, none if all are as they were written."""
    found = []
    for record in records:
        path = checkpoint / record.name
        try:
            if not path.is_file():
                found.append(f"{record.name} is missing")
            elif (size := path.stat().st_size) != record.num_bytes:
                found.append(f"{record.name} has {size} bytes, was written with {record.num_bytes}")
            elif hash_file(path).sha256 != record.sha256:
                found.append(f"{record.name} is not what was written: its SHA-256 differs")
        except OSError as error:
            found.append(f"{record.name} cannot be read: {error.strerror}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError if it is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return record


def json_bytes(value: object) -> bytes:
    """JSON as every file of a checkpoint has it."""
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(body)).hexdigest()


def _check_version(path: Path, record: Mapping[str, Any]) -> None:
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of no mtrl checkpoint: format is {record.get('format')!r}")
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {record.get('version')!r}, this mtrl reads {VERSION}; use the one that wrote it"
        )
