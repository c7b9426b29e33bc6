"""Read and write Hugging Face folders through the weight map: sharded, streaming, exact.

A rank reads only its own boxes of each safetensors file. Random weights for a model from scratch
come through the same door, so they are the same for every layout.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mtrl.models.builder import Model
from mtrl.models.gather import DTYPES, TensorGather
from mtrl.models.hf_folder import INDEX_NAME, SINGLE_NAME, carried_names, check_names, folder_shapes
from mtrl.models.pieces import check_coverage, fill_padding, write_stored
from mtrl.models.quantized import open_folder
from mtrl.models.sources import RandomSource, TensorSource

DEFAULT_SHARD_BYTES = 4 * 2**30


def load_weights(model: Model, source: TensorSource) -> None:
    """Fill this rank's parameters from ``source``, and ``model.carried`` with what is not computed.

    Not collective: each rank reads its own boxes.

    Raises:
        WeightError: the source lacks a tensor, has one that no row of the table reads, or a shape
            differs; the message lists the names. Nothing is written in that case.
    """
    found = source.shapes()
    weight_map = model.weight_map.in_format_of(found)
    check_names(model.config, weight_map.hf_shapes(), found)
    weights = weight_map.of_rank(model.groups.rank)
    tensors = model.tensors()
    check_coverage(tensors, weights)
    fill_padding(tensors, weights)
    for piece in weights.pieces:
        for simple in piece.simple():
            write_stored(tensors, simple, source.read(simple.hf.name, simple.stored))
    world_size = model.groups.layout.world_size
    carried = carried_names(model.config, found)
    model.carried.read(source, carried, rank=model.groups.rank, world_size=world_size)


def load_hf(model: Model, folder: Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder, quantised (``hf_folder.Blocks``) or not.

    Not collective.

    Raises:
        ModelError: the folder's files cannot be read, or are quantised in another way.
        WeightError: as `load_weights` does.
    """
    folder_shapes(folder)
    with open_folder(folder) as source:
        load_weights(model, source)


def initialize(model: Model, seed: int) -> None:
    """Fill this rank's parameters with random weights that do not depend on the layout."""
    std = float(model.config.hf_config.get("initializer_range", 0.02))
    load_weights(model, RandomSource(model.weight_map.hf_shapes(), seed, std))


def export_hf(
    model: Model, folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write the model as a Hugging Face folder: safetensors shards, index and ``config.json``.

    Collective over WORLD. Every tensor is written once; ranks write different shards, and no rank
    holds more than its parameters and one shard. ``dtype`` defaults to the parameters' own; tensors that the
    weight table fixes to one keep it, and carried tensors are written as they were read, in shards of their
    own. Nothing is quantised. The tokenizer's files are the caller's to copy.
    """
    rank, world_size = model.groups.rank, model.groups.layout.world_size
    dtype = dtype or next(iter(model.parameters().values())).dtype
    shards = list(shard_names(_sizes(model, dtype), shard_bytes))
    carried = [
        (owner, names)
        for owner, held in enumerate(model.carried.held)
        for names in shard_names({n: 4 * _numel(model.carried.shapes[n]) for n in held}, shard_bytes)
    ]
    files = _file_names(len(shards) + len(carried))
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(shards), world_size):
        wave = shards[start : start + world_size]
        wanted = [*wave, *([] for _ in range(world_size - len(wave)))]
        tensors = {name: tensor.cpu() for name, tensor in TensorGather(model, wanted).run(dtype)}
        if tensors:
            save_file(tensors, folder / files[start + rank], metadata={"format": "pt"})
    for file, (owner, names) in zip(files[len(shards) :], carried, strict=True):
        if owner == rank:
            tensors = {name: model.carried.tensors[name] for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
    num_bytes = sum(_sizes(model, dtype).values()) + _carried_bytes(model)
    if rank == 0:
        _write_index(folder, files, [*shards, *(names for _, names in carried)], num_bytes)
        _write_config(folder, model, dtype)
    if dist.is_initialized():
        dist.barrier()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _sizes(model: Model, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor of the table."""
    kept = {name: DTYPES[kept] for name, kept in model.weight_map.hf_dtypes().items()}
    return {
        name: _numel(shape) * kept.get(name, dtype).itemsize
        for name, shape in model.weight_map.hf_shapes().items()
    }


def _carried_bytes(model: Model) -> int:
    """Bytes of the carried tensors of all ranks. Collective over WORLD if there are any."""
    if not model.carried.shapes:
        return 0
    device = next(iter(model.parameters().values())).device
    num_bytes = torch.tensor(sum(each.nbytes for each in model.carried.tensors.values()), device=device)
    if dist.is_initialized():
        dist.all_reduce(num_bytes)
    return int(num_bytes)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, files: Sequence[str], shards: Sequence[Sequence[str]], num_bytes: int) -> None:
    if len(files) == 1:
        return
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(folder: Path, model: Model, dtype: torch.dtype) -> None:
    config = {**model.config.hf_config, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)  # the older name, which older readers would believe
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def shard_names(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Group tensors, in order, into files of at most ``shard_bytes`` (or one tensor). ``sizes`` in bytes."""
    group: list[str] = []
    total = 0
    for name, num_bytes in sizes.items():
        if group and total + num_bytes > shard_bytes:
            yield group
            group, total = [], 0
        group.append(name)
        total += num_bytes
    if group:
        yield group
