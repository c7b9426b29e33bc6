"""What a Hugging Face folder of weights holds, from the headers of its files. Pure: reads no weights."""

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtrl.models.config import ModelConfig, read_hf_config
from mtrl.parallel.errors import ModelError, WeightError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

SCALE_SUFFIX = "_scale_inv"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
FP8_DTYPE = "F8_E4M3"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Shape and dtype (safetensors' name of it) of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The rows and columns of a quantised matrix that share a scale: DeepSeek-V3's fp8 format.

    A tensor ``name`` is float8_e4m3fn and ``name + "_scale_inv"`` float32, one number a block (fewer rows or
    columns in the last ones); the weight is their product.
    """

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of ``shape``."""
        *outer, rows, columns = shape
        return (*outer, math.ceil(rows / self.rows), math.ceil(columns / self.columns))


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


def read_headers(file: Path) -> dict[str, Header]:
    """Every tensor of a safetensors file. ModelError if it is not one, or was cut short."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        num_bytes = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        headers = {
            name: Header(shape=tuple(entry["shape"]), dtype=entry["dtype"]) for name, entry in entries.items()
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no safetensors file ({error!r}); download it again") from error
    if file.stat().st_size != num_bytes:
        raise ModelError(
            f"{file} has {file.stat().st_size} bytes and its header says {num_bytes}; download it again"
        )
    return headers


def folder_shapes(folder: Path) -> Shapes:
    """Name and shape of every weight in the folder; scales of quantised ones are left out.

    Raises:
        ModelError: as `weight_files` and `read_headers` do, and for weights in a format that is not read.
    """
    headers: dict[str, Header] = {}
    for file in weight_files(folder):
        headers |= read_headers(file)
    blocks = quantized_blocks(folder)
    unread = [
        f"{name} ({each.dtype})" for name, each in headers.items() if not _is_read(name, headers, blocks)
    ]
    if unread:
        raise ModelError(
            f"{folder} has {len(unread)} tensors in a format that is not read, the first is {unread[0]}; "
            f"{_advice(folder)}"
        )
    return {name: headers[name].shape for name in without_scales(headers)}


def _is_read(name: str, headers: Mapping[str, Header], blocks: Blocks | None) -> bool:
    """Whether a tensor is of floats, or of fp8 with the scales that its shape needs."""
    scales = headers.get(name + SCALE_SUFFIX)
    here = headers[name]
    if scales is None:
        return here.dtype in FLOAT_DTYPES
    fits = blocks is not None and len(here.shape) >= 2 and scales.shape == blocks.grid(here.shape)
    return here.dtype == FP8_DTYPE and fits


def _advice(folder: Path) -> str:
    method = _quantization(folder).get("quant_method", "unnamed")
    advice = "give a folder of the same model in bf16"
    if method == "mxfp4":
        advice += ", which transformers writes with Mxfp4Config(dequantize=True) and save_pretrained"
    return (
        f"quant_method {method!r} in config.json; fp8 with weight_block_size and its scales is read. "
        f"For anything else {advice}"
    )


def _quantization(folder: Path) -> dict[str, object]:
    if not (folder / "config.json").is_file():
        return {}
    return dict(read_hf_config(folder).get("quantization_config") or {})


def quantized_blocks(folder: Path) -> Blocks | None:
    """The blocks of a folder's fp8 weights; None if its config names none."""
    found = _quantization(folder)
    size = found.get("weight_block_size")
    if found.get("quant_method") != "fp8" or not isinstance(size, list) or len(size) != 2:
        return None
    return Blocks(rows=int(size[0]), columns=int(size[1]))


def without_scales(names: Collection[str]) -> list[str]:
    """The names that are not the scales of another."""
    return [
        name
        for name in names
        if not (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in names)
    ]


def carried_names(config: ModelConfig, found: Collection[str]) -> list[str]:
    """The tensors of multi-token prediction layers: after the model's last layer, as many as config says."""
    last = config.num_layers
    layers = tuple(f"model.layers.{last + number}." for number in range(config.num_prediction_layers))
    return [name for name in found if name.startswith(layers)]


def check_names(config: ModelConfig, expected: Mapping[str, tuple[int, ...]], found: Shapes) -> None:
    """Check that a source's tensors and the weight table's are the same, by name and shape.

    Multi-token prediction layers may be there or not.

    Raises:
        WeightError: one is missing, unknown, or of another shape; the message lists the first of them.
    """
    # Some tied checkpoints carry a copy of the embedding.
    known = {*expected, *carried_names(config, found)} | (
        {"lm_head.weight"} if config.tie_embeddings else set()
    )
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown: {name} {found[name]}" for name in found if name not in known]
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
