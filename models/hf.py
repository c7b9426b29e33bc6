"""Read and write Hugging Face folders through the weight map: sharded, streaming, exact.

A rank reads only its own boxes of each safetensors file. Random weights for a model from scratch
come through the same door, so they are the same for every layout.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mtrl.models import fp8_parameters
from mtrl.models.builder import Model
from mtrl.models.files import FileSink, FolderWriter
from mtrl.models.gather import DEFAULT_BUCKET_BYTES, DTYPES, TensorGather
from mtrl.models.hf_folder import INDEX_NAME, SINGLE_NAME, carried_names, check_names, folder_shapes
from mtrl.models.pieces import check_coverage, fill_padding, write_stored
from mtrl.models.quantized import open_folder
from mtrl.models.sources import RandomSource, TensorSource
from mtrl.parallel.agreement import agree

SMALLEST_SHARD_BYTES = 16 * 2**20
LARGEST_SHARD_BYTES = 4 * 2**30


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
    fp8_parameters.write(model.parameters(), tensors)
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
    model: Model, folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> None:
    """Write the model as a Hugging Face folder: see `write_hf`. Collective over WORLD.

    The tokenizer's files are the caller's to copy.

    Raises:
        CheckpointError: on all ranks, if any could not write, or ``folder`` already has such files.
    """
    out = FolderWriter(folder)
    write_hf(model, out, dtype=dtype, shard_bytes=shard_bytes)
    agree(out.error)


def write_hf(
    model: Model,
    out: FileSink,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> None:
    """Give ``out`` this rank's files of a Hugging Face folder: safetensors shards, index and ``config.json``.

    Collective over WORLD. Every tensor is written once; ranks write different shards side by side. Besides
    its parameters a rank holds at most about four times ``bucket_bytes``, or as often its largest tensor:
    what it sends, twice, and what it receives, twice. ``dtype`` defaults to the parameters'
    own; tensors that the weight table fixes to one keep it, and carried tensors are written as they were
    read, in shards of their own. Nothing is quantised. ``shard_bytes`` defaults to an equal share for each
    rank, within `SMALLEST_SHARD_BYTES` and `LARGEST_SHARD_BYTES`.
    """
    rank, world_size = model.groups.rank, model.groups.layout.world_size
    dtype = dtype or next(iter(model.parameters().values())).dtype
    sizes = _sizes(model, dtype)
    shards = list(shard_names(sizes, shard_bytes or _share(sizes, world_size)))
    carried = list(_carried_shards(model, shard_bytes or LARGEST_SHARD_BYTES))
    files = _file_names(len(shards) + len(carried))
    with model.fp8_parameters.masters_shown():
        _write_shards(model, out, list(zip(files, shards, strict=False)), dtype, bucket_bytes)
    for file, (owner, names) in zip(files[len(shards) :], carried, strict=True):
        if owner == rank:
            tensors = {name: model.carried.tensors[name] for name in names}
            with out.tensors(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as put:
                for name, tensor in tensors.items():
                    put(name, tensor)
    num_bytes = sum(sizes.values()) + _carried_bytes(model)
    if rank == 0:
        out.write("config.json", _json(_exported_config(model, dtype)))
        if len(files) > 1:
            all_shards = [*shards, *(names for _, names in carried)]
            out.write(INDEX_NAME, _json(_index(files, all_shards, num_bytes)))


def _write_shards(
    model: Model,
    out: FileSink,
    shards: Sequence[tuple[str, list[str]]],
    dtype: torch.dtype,
    bucket_bytes: int,
) -> None:
    """Write files, each with its tensors, in waves of one a rank. Collective over WORLD."""
    rank, world_size = model.groups.rank, model.groups.layout.world_size
    for start in range(0, len(shards), world_size):
        wave = shards[start : start + world_size]
        wanted = [*(names for _, names in wave), *([] for _ in range(world_size - len(wave)))]
        gather = TensorGather(model, wanted, bucket_bytes=bucket_bytes)
        if rank < len(wave):
            kinds = {name: gather.kind(name, dtype) for name in gather.names}
            with out.tensors(wave[rank][0], kinds) as put:
                for name, tensor in gather.run(dtype):
                    put(name, tensor)
        else:
            assert not list(gather.run(dtype)), "a rank without a file wants no tensors"


def _carried_shards(model: Model, shard_bytes: int) -> Iterator[tuple[int, list[str]]]:
    """Names of the carried tensors of each further file, with the rank that holds them."""
    for owner, held in enumerate(model.carried.held):
        sizes = {name: 4 * _numel(model.carried.shapes[name]) for name in held}
        for names in shard_names(sizes, shard_bytes):
            yield owner, names


def _share(sizes: Mapping[str, int], world_size: int) -> int:
    """Bytes of a file, so that no more of them than ranks are needed where they stay within the limits."""
    share = -(-sum(sizes.values()) // world_size) + max(sizes.values())
    return min(max(share, SMALLEST_SHARD_BYTES), LARGEST_SHARD_BYTES)


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


def _exported_config(model: Model, dtype: torch.dtype) -> dict[str, object]:
    config = {**model.config.hf_config, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)  # the older name, which older readers would believe
    config.pop("quantization_config", None)
    return config


def _index(files: Sequence[str], shards: Sequence[Sequence[str]], num_bytes: int) -> dict[str, object]:
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    return {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


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
