"""Conversion between Hugging Face folders, mtrl checkpoints and Megatron's ``torch_dist``, as a stream.

A conversion is planned from headers alone, written into a neighbour of the target, proved, and only then
given its name. One part of one tensor is in memory at a time (`PART_BYTES`; a stored chunk too where
Megatron's format is read or written), whatever the model's size. What was written stays if it is interrupted,
and is not written again. A folder's tensors keep the names they have; Megatron's get the family's published
ones.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mtrl.checkpoint.format import FORMAT, MANIFEST, STATE, Manifest, RunState, json_bytes, read_json
from mtrl.checkpoint.megatron_weights import TorchDistSource
from mtrl.checkpoint.megatron_write import write_torch_dist
from mtrl.checkpoint.save import TOKENIZER_FILES
from mtrl.checkpoint.torch_dist import TRACKER
from mtrl.models.boxes import Box
from mtrl.models.config import ModelConfig, read_hf_config
from mtrl.models.durable import FileRecord, hash_file, sync_folder, write_file
from mtrl.models.families import load_model_config
from mtrl.models.files import SafetensorsWriter, TensorKind
from mtrl.models.hf import shard_names
from mtrl.models.hf_folder import INDEX_NAME, SINGLE_NAME, carried_names, check_names, quantized_blocks
from mtrl.models.quantized import open_folder
from mtrl.models.sources import TypedSource
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import CheckpointError, ModelError, OutputExistsError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec

FormatName = Literal["hf", "mtrl", "torch_dist"]
PART_BYTES = 64 * 2**20
DONE = "finished.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for. ``config`` is a folder with config.json and tokenizer, where the source has none.

    ``dtype`` casts floats, those aside that the family fixes; None keeps them (bf16 where they are
    quantised). ``with_optimizer`` takes an mtrl checkpoint's training state along.
    """

    source: Path
    target: Path
    to: FormatName
    config: Path | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = 4 * 2**30
    with_optimizer: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be written: tensors by file, other files to copy, and the config."""

    request: Request
    source_format: FormatName
    config: ModelConfig
    hf_config: Mapping[str, object]
    shards: Mapping[str, Mapping[str, TensorKind]]
    copies: Mapping[str, Path]
    notes: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, TensorKind]:
        """Dtype and shape of every tensor."""
        return {name: kind for tensors in self.shards.values() for name, kind in tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(num_bytes(kind) for kind in self.kinds.values())

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.request.target.with_name(f"{self.request.target.name}.partial")

    def identity(self) -> str:
        """A digest of all that decides what is written; a partial folder of another one is not gone on
        with.
        """
        shards = {f: {n: [str(d), list(s)] for n, (d, s) in t.items()} for f, t in self.shards.items()}
        sizes = sorted(
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.request.source.iterdir()
            if path.is_file()
        )
        text = json_bytes([str(self.request.source), self.request.to, shards, sizes, sorted(self.copies)])
        return hashlib.sha256(text).hexdigest()


def num_bytes(kind: TensorKind) -> int:
    """Bytes of a tensor."""
    dtype, shape = kind
    return torch.Size(shape).numel() * dtype.itemsize


def format_of(folder: Path) -> FormatName:
    """Which format a folder has.

    Raises:
        ModelError: none of them.
    """
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("format") == FORMAT:
        return "mtrl"
    if (folder / ".metadata").is_file() or (folder / TRACKER).is_file():
        return "torch_dist"
    if (folder / "config.json").is_file():
        return "hf"
    raise ModelError(
        f"{folder} is neither a Hugging Face folder (config.json), nor an mtrl checkpoint ({MANIFEST}), nor "
        f"one of Megatron's ({TRACKER} or .metadata)"
    )


@contextmanager
def open_source(
    folder: Path, kind: FormatName, config: ModelConfig, names: Collection[str] = ()
) -> Iterator[TypedSource]:
    """The weights of a folder of a format, by Hugging Face names, dequantised where they are quantised.

    For ``torch_dist`` the names are those of the family's format that has most of ``names``.
    """
    if kind == "torch_dist":
        with TorchDistSource(folder, config, names=names) as source:
            yield source
    else:
        with open_folder(folder) as source:
            yield source


def make_plan(request: Request) -> Plan:
    """Plan a conversion from headers and configs; reads no weights and writes nothing.

    Raises:
        OutputExistsError: the target holds something.
        ModelError, WeightError: the source cannot be read, or lacks tensors.
        CheckpointError: what cannot be asked of this source.
    """
    target = request.target
    if (target.is_dir() and any(target.iterdir())) or target.is_file():
        raise OutputExistsError(f"{target} exists and is not an empty folder; give another target")
    kind = format_of(request.source)
    if request.with_optimizer and (kind, request.to) != ("mtrl", "mtrl"):
        raise CheckpointError(
            f"optimizer state goes from mtrl checkpoints to mtrl checkpoints, not from {kind} to "
            f"{request.to}; leave --with-optimizer out"
        )
    if request.with_optimizer and request.dtype is not None:
        raise CheckpointError(
            "optimizer state belongs to the weights as they are; leave out --dtype or --with-optimizer"
        )
    home = request.config or request.source
    if kind == "torch_dist" and request.config is None:
        raise ModelError(
            f"{request.source} has no Hugging Face config; give a folder that has it, and the tokenizer, "
            "with --config"
        )
    config = load_model_config(home)
    with open_source(request.source, kind, config) as source:
        found, dtypes = source.shapes(), source.dtypes()
    weight_map = _one_process(config).in_format_of(found)
    check_names(config, weight_map.hf_shapes(), found)
    fixed = {name: getattr(torch, dtype) for name, dtype in weight_map.hf_dtypes().items()}
    carried = set(carried_names(config, found))
    kinds = {
        name: (_dtype(name, dtypes[name], fixed, request.dtype), shape)
        for name, shape in _by_layer(found, kind)
        if request.to != "torch_dist" or name not in carried
    }
    notes = []
    if request.to == "torch_dist" and carried:
        notes.append(f"{len(carried)} tensors of multi-token prediction layers are left out")
    hf_config, copies = _other_files(home, request, notes, config)
    return Plan(
        request=request,
        source_format=kind,
        config=config,
        hf_config=hf_config,
        shards=_shards(kinds, request.shard_bytes),
        copies=copies,
        notes=tuple(notes),
    )


def _by_layer(found: Mapping[str, tuple[int, ...]], kind: FormatName) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors in the order in which they are read: layer by layer where several come out of one stored
    chunk.
    """
    if kind != "torch_dist":
        return list(found.items())
    layer = re.compile(r"\.layers\.(\d+)\.")
    matches = {name: layer.search(name) for name in found}
    number = {name: int(match[1]) if match else -1 for name, match in matches.items()}
    return sorted(found.items(), key=lambda item: number[item[0]])


def _dtype(
    name: str, stored: torch.dtype, fixed: Mapping[str, torch.dtype], wanted: torch.dtype | None
) -> torch.dtype:
    if wanted is None or not stored.is_floating_point:
        return stored
    return fixed.get(name, wanted)


def _one_process(config: ModelConfig) -> WeightMap:
    layout = RankLayout.from_spec(parse_training_spec("megatron:d1"))
    return WeightMap(config=config, layout=layout, stages=Stages.balanced(config.num_layers, 1, 1), places={})


def _shards(kinds: Mapping[str, TensorKind], shard_bytes: int) -> dict[str, dict[str, TensorKind]]:
    """Tensors by file; in each the wider dtypes come first, so that all are aligned."""
    groups = list(shard_names({name: num_bytes(kind) for name, kind in kinds.items()}, shard_bytes))
    count = len(groups)
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return {
        file: {name: kinds[name] for name in sorted(group, key=lambda n: -kinds[n][0].itemsize)}
        for file, group in zip(files if count > 1 else [SINGLE_NAME], groups, strict=True)
    }


def _other_files(
    home: Path, request: Request, notes: list[str], config: ModelConfig
) -> tuple[dict[str, object], dict[str, Path]]:
    """The config to write, and what is copied as it is."""
    hf_config = dict(read_hf_config(home))
    if quantized_blocks(home) is not None:
        hf_config.pop("quantization_config")
        hf_config.pop("torch_dtype", None)
        hf_config["dtype"] = "bfloat16"
    if request.dtype is not None:
        hf_config.pop("torch_dtype", None)
        hf_config["dtype"] = str(request.dtype).removeprefix("torch.")
    copies = {name: home / name for name in TOKENIZER_FILES if (home / name).is_file()}
    if "auto_map" in hf_config:
        if request.trust_remote_code:
            copies |= {path.name: path for path in home.glob("*.py")}
        else:
            hf_config.pop("auto_map")
            notes.append("auto_map is left out of config.json, with its code; --trust-remote-code keeps both")
    if request.with_optimizer:
        copies |= {
            record.name: home / record.name
            for record in Manifest.read(home).files
            if record.name.startswith("training/")
        }
    return hf_config, copies


def convert(plan: Plan, report: Callable[[int], None]) -> None:
    """Write the plan's folder beside the target; `finish` gives it its name.

    ``report`` is told bytes as they are written, or found written by a conversion that was interrupted.

    Raises:
        OSError: as the system says; what was written stays, for the next try.
    """
    if plan.request.to == "torch_dist":
        shutil.rmtree(plan.partial, ignore_errors=True)
        with open_source(plan.request.source, plan.source_format, plan.config) as source:
            left_out = [name for name in source.shapes() if name not in plan.kinds]
            write_torch_dist(plan.partial, plan.config, source, dtype=plan.request.dtype, leave_out=left_out)
        report(plan.num_bytes)
        return
    done = _begin(plan)
    with open_source(plan.request.source, plan.source_format, plan.config) as source:
        for file, tensors in plan.shards.items():
            if file in done:
                report(sum(num_bytes(kind) for kind in tensors.values()))
                continue
            _finished(plan, _write_shard(plan.partial / file, tensors, source, report))
    for name, path in plan.copies.items():
        if name not in done:
            (plan.partial / name).parent.mkdir(exist_ok=True)
            (plan.partial / name).unlink(missing_ok=True)
            _finished(plan, _named(write_file(plan.partial / name, path.read_bytes()), name))
    texts = {"config.json": json_bytes(plan.hf_config)}
    if len(plan.shards) > 1:
        weight_map = {name: file for file, tensors in plan.shards.items() for name in tensors}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        texts[INDEX_NAME] = json_bytes(index)
    for name, text in texts.items():
        (plan.partial / name).unlink(missing_ok=True)
        _finished(plan, write_file(plan.partial / name, text))


def _named(record: FileRecord, name: str) -> FileRecord:
    return FileRecord(name=name, num_bytes=record.num_bytes, sha256=record.sha256)


def _begin(plan: Plan) -> dict[str, FileRecord]:
    """The files of an interrupted conversion of the same plan that are whole; anything else is deleted."""
    notes, found = plan.partial / DONE, {}
    if notes.is_file():
        lines = notes.read_text().splitlines()
        if lines and lines[0] == plan.identity():
            for line in lines[1:]:
                record = FileRecord(**json.loads(line))
                path = plan.partial / record.name
                if path.is_file() and _named(hash_file(path), record.name) == record:
                    found[record.name] = record
    if not found:
        shutil.rmtree(plan.partial, ignore_errors=True)
    plan.partial.mkdir(parents=True, exist_ok=True)
    kept = {notes, *(plan.partial / name for name in found)}
    for path in plan.partial.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    lines = [plan.identity(), *(json.dumps(record.to_json()) for record in found.values())]
    notes.write_text("\n".join(lines) + "\n")
    return found


def _finished(plan: Plan, record: FileRecord) -> None:
    with (plan.partial / DONE).open("a") as file:
        file.write(json.dumps(record.to_json()) + "\n")


def _write_shard(
    path: Path, tensors: Mapping[str, TensorKind], source: TypedSource, report: Callable[[int], None]
) -> FileRecord:
    with SafetensorsWriter(path, tensors) as writer:
        for name, (dtype, shape) in tensors.items():
            writer.write_parts(name, (part.to(dtype) for part in read_parts(source, name, shape)))
            report(num_bytes((dtype, shape)))
        return writer.close()


def read_parts(source: TypedSource, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """A tensor in parts of about `PART_BYTES`, in the order of its memory."""
    box = Box.full(shape)
    if not shape:
        yield source.read(name, box)
        return
    row_bytes = max(1, 4 * torch.Size(shape[1:]).numel())
    count = max(1, PART_BYTES // row_bytes)
    for start in range(0, shape[0], count):
        yield source.read(name, Box(((start, min(start + count, shape[0])), *box.ranges[1:])))


def finish(plan: Plan) -> None:
    """Give what was written, and proved, its name; an mtrl checkpoint gets its manifest first."""
    if plan.request.to == "mtrl":
        lines = (plan.partial / DONE).read_text().splitlines()[1:]
        records = {record.name: record for record in (FileRecord(**json.loads(line)) for line in lines)}
        step = RunState.read(plan.partial).step if STATE in records else 0
        manifest = Manifest(step=step, files=tuple(records[name] for name in sorted(records)))
        (plan.partial / MANIFEST).unlink(missing_ok=True)
        write_file(plan.partial / MANIFEST, manifest.to_json())
    (plan.partial / DONE).unlink(missing_ok=True)
    sync_folder(plan.partial)
    if plan.request.target.is_dir():
        plan.request.target.rmdir()
    plan.partial.rename(plan.request.target)
    sync_folder(plan.request.target.absolute().parent)
