"""What a conversion is to do, decided from headers and configs alone: reads no weights, writes nothing."""

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from mtrl.checkpoint.format import COPIED_FILES, FORMAT, MANIFEST, Manifest, json_bytes, read_json
from mtrl.checkpoint.megatron_weights import TorchDistSource, checkpoint_map
from mtrl.checkpoint.torch_dist import TRACKER, step_folder
from mtrl.models.config import ModelConfig, read_hf_config
from mtrl.models.families import load_model_config
from mtrl.models.files import TensorKind
from mtrl.models.hf_folder import SINGLE_NAME, check_names, folder_shapes, quantized_blocks
from mtrl.models.quantized import open_folder
from mtrl.models.sources import TypedSource
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import CheckpointError, ModelError, OutputExistsError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec

FormatName = Literal["hf", "mtrl", "torch_dist"]
JOURNAL = "finished.jsonl"
_MAY_NAME_CODE = ("config.json", "tokenizer_config.json")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


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

    @property
    def home(self) -> Path:
        """The folder whose config.json and tokenizer count."""
        return self.config or self.source

    @property
    def partial(self) -> Path:
        """Where it is written until it is proved."""
        return self.target.with_name(f"{self.target.name}.partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be written: tensors by file, other files to copy, and the config.

    ``left_out`` are the source's tensors that the target's format has no place for.
    """

    request: Request
    source_format: FormatName
    config: ModelConfig
    hf_config: Mapping[str, object]
    shards: Mapping[str, Mapping[str, TensorKind]]
    left_out: tuple[str, ...]
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

    def identity(self) -> str:
        """A digest of all that decides what is written; a partial folder of another one is not gone on
        with.
        """
        source = self.request.source
        folder = step_folder(source) if self.source_format == "torch_dist" else source
        files = {*folder.iterdir(), *self.copies.values(), self.request.home / "config.json"}
        states = [(str(path), path.stat()) for path in sorted(files) if path.is_file()]
        shards = {f: {n: [str(d), list(s)] for n, (d, s) in t.items()} for f, t in self.shards.items()}
        content = {
            "to": self.request.to,
            "files": [[path, state.st_size, state.st_mtime_ns, state.st_ino] for path, state in states],
            "shards": shards,
            "copies": sorted(self.copies),
            "config": self.hf_config,
        }
        return hashlib.sha256(json_bytes(content)).hexdigest()


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
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; nothing is downloaded")
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
    """Plan a conversion.

    Raises:
        OutputExistsError: the target, or its neighbour ``.partial``, holds something of somebody else's.
        ModelError, WeightError: the source cannot be read, or lacks tensors.
        CheckpointError: what cannot be asked of this source.
    """
    source, target = (Path(os.path.abspath(path)) for path in (request.source, request.target))
    request = replace(request, source=source, target=target)
    kind = format_of(source)
    _check_folders(request)
    _check_request(request, kind)
    config = load_model_config(request.home)
    if kind != "torch_dist":
        folder_shapes(source)  # refuses formats that are not read
    with open_source(source, kind, config) as weights:
        found, dtypes = weights.shapes(), weights.dtypes()
    whole = checkpoint_map(config) if request.to == "torch_dist" else _one_process(config)
    weight_map = whole.in_format_of(found)
    check_names(config, weight_map.hf_shapes(), found)
    fixed = {_LAYER.sub(".", name): getattr(torch, of) for name, of in weight_map.hf_dtypes().items()}
    known = weight_map.hf_shapes()
    left_out = tuple(name for name in found if request.to == "torch_dist" and name not in known)
    kinds = {
        name: (_dtype(name, dtypes[name], fixed, request.dtype), found[name])
        for name in (_reading_order(found) if kind == "torch_dist" else found)
        if name not in left_out
    }
    is_as_it_was = kind != "torch_dist" and request.dtype is None and quantized_blocks(source) is None
    hf_config, notes = _config(request, None if is_as_it_was else _main_dtype(kinds))
    return Plan(
        request=request,
        source_format=kind,
        config=config,
        hf_config=hf_config,
        shards=_shards(kinds, request.shard_bytes),
        left_out=left_out,
        copies=_copies(request),
        notes=(*_left_out_notes(left_out), *notes),
    )


def _check_folders(request: Request) -> None:
    """Check that writing the target touches nothing that is somebody's."""
    target, partial = request.target, request.partial
    homes = {request.source.resolve(), request.home.resolve()}
    for path in (target, partial):
        inside = [home for home in homes if path.resolve().is_relative_to(home)]
        if inside:
            raise OutputExistsError(f"{path} lies in {inside[0]}, which is read; give a target outside of it")
    for home in homes:
        if home.is_relative_to(partial.resolve()):
            raise OutputExistsError(f"{home} is read, and {partial} is written over; give another target")
    if _holds_something(target):
        raise OutputExistsError(f"{target} exists and is not an empty folder; give another target")
    if _holds_something(partial) and not (partial / JOURNAL).is_file() and not _is_bare(partial):
        raise OutputExistsError(
            f"{partial} is where this would be written, and no conversion made it; move it away"
        )


def _holds_something(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return path.is_symlink() or path.exists()
    return any(path.iterdir())


def _is_bare(partial: Path) -> bool:
    """Whether a conversion was killed before its journal had its name."""
    return partial.is_dir() and all(path.name.startswith(f".{JOURNAL}.") for path in partial.iterdir())


def _check_request(request: Request, kind: FormatName) -> None:
    if request.with_optimizer and (kind, request.to) != ("mtrl", "mtrl"):
        raise CheckpointError(
            f"optimizer state goes from mtrl checkpoints to mtrl checkpoints, not from {kind} to "
            f"{request.to}; leave --with-optimizer out"
        )
    if request.with_optimizer and request.dtype is not None:
        raise CheckpointError(
            "optimizer state belongs to the weights as they are; leave out --dtype or --with-optimizer"
        )
    if kind == "torch_dist" and request.config is None:
        raise ModelError(
            f"{request.source} has no Hugging Face config; give a folder that has it, and the tokenizer, "
            "with --config"
        )


def _reading_order(names: Collection[str]) -> list[str]:
    """Names so that those that may come out of one stored chunk of Megatron's are near each other."""

    def place(name: str) -> tuple[int, int]:
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        return int(layer[1]) if layer else -1, int(expert[1]) if expert else -1

    return sorted(names, key=place)


def _dtype(
    name: str, stored: torch.dtype, fixed: Mapping[str, torch.dtype], wanted: torch.dtype | None
) -> torch.dtype:
    """What a tensor is written in; ``fixed`` are names without their layer: prediction layers have them
    too.
    """
    if wanted is None or not stored.is_floating_point:
        return stored
    return fixed.get(_LAYER.sub(".", name), wanted)


def _main_dtype(kinds: Mapping[str, TensorKind]) -> torch.dtype:
    """The dtype of most bytes."""
    totals: dict[torch.dtype, int] = {}
    for kind in kinds.values():
        totals[kind[0]] = totals.get(kind[0], 0) + num_bytes(kind)
    return max(totals, key=lambda dtype: totals[dtype])


def _one_process(config: ModelConfig) -> WeightMap:
    layout = RankLayout.from_spec(parse_training_spec("megatron:d1"))
    return WeightMap(config=config, layout=layout, stages=Stages.balanced(config.num_layers, 1, 1), places={})


def _shards(kinds: Mapping[str, TensorKind], shard_bytes: int) -> dict[str, dict[str, TensorKind]]:
    """Tensors by file, of about equal sizes; in each the wider dtypes come first, so that all are aligned."""
    total = sum(num_bytes(kind) for kind in kinds.values())
    share = total / max(1, -(-total // shard_bytes))
    groups: list[list[str]] = [[]]
    reached = held = 0
    for name, kind in kinds.items():
        size = num_bytes(kind)
        # A file ends where its share of all bytes does, and before a tensor that it has no room for.
        if groups[-1] and (reached >= share * len(groups) or held + size > shard_bytes):
            groups.append([])
            held = 0
        groups[-1].append(name)
        reached, held = reached + size, held + size
    count = len(groups)
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return {
        file: {name: kinds[name] for name in sorted(group, key=lambda n: -kinds[n][0].itemsize)}
        for file, group in zip(files if count > 1 else [SINGLE_NAME], groups, strict=True)
    }


def _left_out_notes(left_out: Collection[str]) -> Iterator[str]:
    copies = [name for name in left_out if name == "lm_head.weight"]
    if copies:
        yield "lm_head.weight is left out: config.json ties it to the embedding"
    if len(left_out) > len(copies):
        yield f"{len(left_out) - len(copies)} tensors of multi-token prediction layers are left out"


def _config(request: Request, dtype: torch.dtype | None) -> tuple[dict[str, object], list[str]]:
    """The config to write, where ``dtype`` is what most is written in if that is another; and notes."""
    hf_config, notes = dict(read_hf_config(request.home)), []
    hf_config.pop("quantization_config", None)
    if dtype is not None:
        hf_config.pop("torch_dtype", None)  # the older name, which older readers would believe
        hf_config["dtype"] = str(dtype).removeprefix("torch.")
    if _names_code(request.home, "config.json") and not request.trust_remote_code:
        hf_config.pop("auto_map")
        notes.append("auto_map is left out of config.json, with its code; --trust-remote-code keeps both")
    if _names_code(request.home, "tokenizer_config.json") and not request.trust_remote_code:
        notes.append("the tokenizer's code (auto_map) is not copied; --trust-remote-code copies it")
    return hf_config, notes


def _names_code(home: Path, file: str) -> bool:
    return (home / file).is_file() and "auto_map" in read_json(home / file)


def _copies(request: Request) -> dict[str, Path]:
    """What is copied as it is, by the name it gets."""
    if request.to == "torch_dist":
        return {}
    home = request.home
    copies = {name: home / name for name in COPIED_FILES if (home / name).is_file()}
    if request.trust_remote_code and any(_names_code(home, file) for file in _MAY_NAME_CODE):
        copies |= {path.name: path for path in sorted(home.glob("*.py")) if path.is_file()}
    if request.with_optimizer:
        records = Manifest.read(request.source).files
        copies |= {r.name: request.source / r.name for r in records if r.name.startswith("training/")}
    return copies
