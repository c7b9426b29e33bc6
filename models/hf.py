"""Read and write Hugging Face folders through the weight map: sharded, streaming, exact.

A rank reads only its own boxes of each safetensors file. Random weights for a model from scratch
come through the same door, so they are the same for every layout.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from mtrl.models.boxes import Box
from mtrl.models.builder import Model
from mtrl.models.gather import TensorGather
from mtrl.models.hf_folder import INDEX_NAME, SINGLE_NAME, check_names, weight_files
from mtrl.models.pieces import check_coverage, fill_padding, write_stored

DEFAULT_SHARD_BYTES = 4 * 2**30


class TensorSource(Protocol):
    """Where weights come from: names with shapes, and any box of any of them."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor there is."""
        ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box``, on the CPU, in the source's dtype."""
        ...


class SafetensorsSource:
    """The weights of a Hugging Face folder, read slice by slice. A context manager.

    Raises:
        ModelError: the folder has no safetensors, or its index names a file that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for file in weight_files(self.folder):
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            self._files[file.name] = handle
            self._where.update(dict.fromkeys(handle.keys(), file.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the folder."""
        return {
            name: tuple(self._files[file].get_slice(name).get_shape()) for name, file in self._where.items()
        }

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box`` of tensor ``name``."""
        tensor: torch.Tensor = self._files[self._where[name]].get_slice(name)[box.slices]
        return tensor


class RandomSource:
    """Weights for training from scratch: norms are 1, biases and sinks 0, all else normal with mean 0.

    Each tensor has a generator of its own, seeded by (seed, name): the model does not depend on the
    layout, nor a tensor on the order of reading. ``std`` defaults to the config's
    ``initializer_range``, as transformers does.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, std: float) -> None:
        self._shapes, self.seed, self.std = shapes, seed, std

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model."""
        return dict(self._shapes)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box`` of tensor ``name``, float32."""
        shape = self._shapes[name]
        if name.endswith(("bias", "sinks")):
            return torch.zeros(box.shape)
        if len(shape) == 1:
            return torch.ones(box.shape)
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator)[box.slices] * self.std


def load_weights(model: Model, source: TensorSource) -> None:
    """Fill this rank's parameters from ``source``. Not collective: each rank reads its own boxes.

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


def load_hf(model: Model, folder: Path) -> None:
    """Fill this rank's parameters from a Hugging Face folder. Not collective."""
    with SafetensorsSource(folder) as source:
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
    holds more than its parameters and one shard. ``dtype`` defaults to the parameters' own. The
    tokenizer's files are the caller's to copy.
    """
    rank, world_size = model.groups.rank, model.groups.layout.world_size
    dtype = dtype or next(iter(model.parameters().values())).dtype
    shapes = model.weight_map.hf_shapes()
    shards = list(shard_names(shapes, dtype.itemsize, shard_bytes))
    files = [
        SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(shards), world_size):
        wave = shards[start : start + world_size]
        wanted = [*wave, *([] for _ in range(world_size - len(wave)))]
        tensors = {name: tensor.cpu() for name, tensor in TensorGather(model, wanted).run(dtype)}
        if tensors:
            save_file(tensors, folder / files[start + rank], metadata={"format": "pt"})
    if rank == 0:
        _write_index(folder, files, shards, shapes, dtype)
        config = {**model.config.hf_config, "dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)  # the older name, which older readers would believe
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if dist.is_initialized():
        dist.barrier()


def _write_index(
    folder: Path,
    files: list[str],
    shards: list[list[str]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    if len(files) == 1:
        return
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def shard_names(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Group tensor names, in order, into files of at most ``shard_bytes`` (or one tensor)."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * itemsize
        if group and size + num_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    if group:
        yield group
