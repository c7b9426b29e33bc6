"""What a Hugging Face folder of weights holds, from the headers of its files. Pure: reads no weights."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtrl.models.config import ModelConfig, read_hf_config
from mtrl.models.safetensors_header import MAX_HEADER_BYTES, Header, parse_object, read_headers
from mtrl.parallel.errors import ModelError, WeightError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

SCALE_SUFFIX = "_scale_inv"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
FP8_DTYPE = "F8_E4M3"

Shapes = dict[str, tuple[int, ...]]


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


SQUARE = Blocks(rows=128, columns=128)
"""Of DeepSeek-V3's format."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's model, as its index names them.

    Each may be a symlink, as it is in Hugging Face's cache. Their headers were read and agree with the index.

    Raises:
        ModelError: there are none, one is missing or no whole safetensors file, or the index disagrees.
    """
    return list(read_folder(folder))


def read_folder(folder: Path) -> dict[Path, dict[str, Header]]:
    """The files of `weight_files`, and what each holds."""
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise ModelError(
                f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a folder with weights, or "
                "start from random ones with model.init in place of model.path"
            )
        return {folder / SINGLE_NAME: read_headers(folder / SINGLE_NAME)}
    file_of = _read_index(index)
    names = sorted(set(file_of.values()))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {INDEX_NAME} names {name}, which is missing; download it again")
    headers = {name: read_headers(folder / name) for name in names}
    _check_index(folder, file_of, headers)
    return {folder / name: headers[name] for name in names}


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, by name."""
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has {index.stat().st_size} bytes, more than {MAX_HEADER_BYTES}")
        file_of = parse_object(index.read_bytes()).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise ValueError("weight_map is no object that names files")
        for file in file_of.values():
            if not _is_plain_name(file):
                raise ValueError(f"{file!r:.100} is not the name of a safetensors file in the folder")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{index} cannot be used: {error}; download the folder again") from error
    return file_of


def _is_plain_name(name: object) -> bool:
    """Whether a file of that name can only lie in the folder itself."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and not any(separator in name for separator in "/\\")
    )


def _check_index(
    folder: Path, file_of: Mapping[str, str], headers: Mapping[str, Mapping[str, Header]]
) -> None:
    found: dict[str, str] = {}
    for file, tensors in headers.items():
        for name in tensors:
            if name in found:
                raise ModelError(
                    f"{folder}: both {found[name]} and {file} hold {name}; download the folder again"
                )
            found[name] = file
    for name, file in file_of.items():
        if name not in headers[file]:
            raise ModelError(
                f"{folder}: {file} lacks {name!r:.100}, which {INDEX_NAME} says it holds; download it again"
            )


def folder_shapes(folder: Path) -> Shapes:
    """Name and shape of every weight in the folder; scales of quantised ones are left out.

    Raises:
        ModelError: as `weight_files` does, and for weights in a format that is not read.
    """
    headers = {name: each for held in read_folder(folder).values() for name, each in held.items()}
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
    found = read_hf_config(folder).get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ModelError(
            f"{folder}: quantization_config in config.json is {found!r:.100}, and must be an object"
        )
    return found


def quantized_blocks(folder: Path) -> Blocks | None:
    """The blocks of a folder's fp8 weights; None if its config names none."""
    found = _quantization(folder)
    size = found.get("weight_block_size")
    if found.get("quant_method") != "fp8" or size is None:
        return None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or any(type(each) is not int or each < 1 for each in size)
    ):
        raise ModelError(f"{folder}: weight_block_size in config.json is {size!r:.100}; two sizes are needed")
    return Blocks(rows=size[0], columns=size[1])


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
