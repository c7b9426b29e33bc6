"""What a Hugging Face folder of weights holds, from the headers of its files. Pure: reads no weights."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from mtrl.models.config import ModelConfig
from mtrl.parallel.errors import ModelError, WeightError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

Shapes = dict[str, tuple[int, ...]]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's model, as its index names them.

    Raises:
        ModelError: there are none, or the index names a file that is missing.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise ModelError(
                f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a folder with weights, or "
                "start from random ones with model.init in place of model.path"
            )
        return [folder / SINGLE_NAME]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error!r}); download the folder again") from error
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {INDEX_NAME} names {name}, which is missing; download it again")
    return [folder / name for name in names]


def header_shapes(file: Path) -> Shapes:
    """Name and shape of every tensor of a safetensors file. ModelError if it is not one, or was cut short."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        num_bytes = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no safetensors file ({error!r}); download it again") from error
    if file.stat().st_size != num_bytes:
        raise ModelError(
            f"{file} has {file.stat().st_size} bytes and its header says {num_bytes}; download it again"
        )
    return shapes


def folder_shapes(folder: Path) -> Shapes:
    """Name and shape of every tensor in the folder. ModelError as `weight_files` and `header_shapes` do."""
    shapes: Shapes = {}
    for file in weight_files(folder):
        shapes |= header_shapes(file)
    return shapes


def check_names(config: ModelConfig, expected: Mapping[str, tuple[int, ...]], found: Shapes) -> None:
    """Check that a source's tensors and the weight table's are the same, by name and shape.

    Raises:
        WeightError: one is missing, unknown, or of another shape; the message lists the first of them.
    """
    # Some tied checkpoints carry a copy of the embedding.
    copies = {"lm_head.weight"} if config.tie_embeddings else set()
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown: {name} {found[name]}" for name in found if name not in {*expected, *copies}]
    problems += [
        f"shape of {name}: {found[name]}, config.json implies {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightError(
            f"weights do not match the {config.family} weight table ({len(problems)} problems):\n"
            f"  {shown}{more}"
        )
