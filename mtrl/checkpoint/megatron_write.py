"""Writes Megatron's own ``torch_dist`` checkpoints, weights only.

Megatron-LM loads what is written here with ``--load``, ``--ckpt-format torch_dist`` and, as there is no
optimizer, ``--finetune``; under any layout of its own.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from mtrl.checkpoint.chunk_boxes import Extent, copy, overlaps, view_boxes
from mtrl.checkpoint.megatron_names import LAYERS, extra_state, split_layer, written_names
from mtrl.checkpoint.megatron_weights import checkpoint_map
from mtrl.checkpoint.torch_dist import (
    RELEASE,
    TRACKER,
    StoredTensor,
    Stretch,
    dump_common,
    dump_into,
    dump_metadata,
)
from mtrl.models.boxes import Box, Piece, View
from mtrl.models.config import ModelConfig
from mtrl.models.hf_folder import carried_names, check_names
from mtrl.models.sources import TensorSource
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import ModelError, OutputExistsError, WeightError

CHUNK_BYTES = 32 * 2**20
FILE_BYTES = 4 * 2**30
WRITTEN = "written.jsonl"
"""Names, while a checkpoint is written, the files that are whole and the chunks in them."""

Layers = Literal["separate", "stacked"]


def write_torch_dist(
    folder: Path,
    config: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    iteration: int = 0,
    layers: Layers = "separate",
    leave_out: Collection[str] = (),
    resume: bool = False,
    report: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write the weights of ``source`` as a ``torch_dist`` checkpoint below ``folder``. Returns its folder.

    It is named ``iter_XXXXXXX``, or ``release`` for iteration 0, and ``folder``'s tracker file then names it.
    It is written beside and renamed when it is whole and on the disk. A chunk and what is
    read of one tensor for it are in memory: ``CHUNK_BYTES`` each, or one head group, half or expert.

    Args:
        folder: where Megatron-LM's ``--load`` points.
        config: the model.
        source: its tensors, in any format that the family reads.
        dtype: what floats are written in, those that the family fixes aside; None is the source's own.
        iteration: the step of training that the weights are of.
        layers: a tensor a layer, which Megatron-LM finds whatever the model, as ``content_metadata`` says so;
            or all layers' in one, which is what a Megatron model asks for by itself where all are alike.
        leave_out: names of ``source`` that are not to be written; the caller tells of them.
        resume: go on with files that an interrupted call wrote whole; the caller knows that all arguments,
            and the source, are those of that call.
        report: told the bytes of each chunk, as it is written or found written.

    Raises:
        OutputExistsError: there is such a checkpoint already.
        ModelError: Megatron has no key for a part of the model, or the layers are not alike.
        WeightError: tensors are missing, unknown or of another shape.
    """
    weight_map = _map_for(config, source, layers, leave_out)
    name = f"iter_{iteration:07d}" if iteration else RELEASE
    if (folder / name).exists():
        raise OutputExistsError(f"{folder / name} exists; move it away or give another iteration")
    partial = folder / f".{name}.partial"
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder=partial, config=config, source=source, dtype=dtype, layers=layers, report=report)
    writer.restore()
    writer.write(weight_map)
    common = dump_common(
        _arguments(config), checkpoint_version=3.0, iteration=iteration, content_metadata=_content(layers)
    )
    _write_file(partial / "common.pt", common)
    _write_file(partial / "metadata.json", b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (partial / WRITTEN).unlink(missing_ok=True)
    _sync(partial)
    partial.rename(folder / name)
    _write_file(folder / f".{TRACKER}.partial", (str(iteration) if iteration else RELEASE).encode())
    (folder / f".{TRACKER}.partial").replace(folder / TRACKER)
    _sync(folder)
    return folder / name


def _map_for(
    config: ModelConfig, source: TensorSource, layers: Layers, leave_out: Collection[str]
) -> WeightMap:
    """The map of the source's format, once its names are checked."""
    found = {name: shape for name, shape in source.shapes().items() if name not in leave_out}
    weight_map = checkpoint_map(config).in_format_of(found)
    check_names(config, weight_map.hf_shapes(), found)
    carried = carried_names(config, found)
    if carried:
        raise ModelError(
            f"{len(carried)} tensors of multi-token prediction layers, the first is {carried[0]}, are not "
            "written as torch_dist; pass their names in leave_out to convert the model without them"
        )
    if layers == "stacked" and config.dense_layers and config.moe_layers:
        raise ModelError(
            f"{config.family}: layers {config.dense_layers[:4]} are dense and others mixtures, so they "
            "have no tensors in common to stack; write layers='separate'"
        )
    return weight_map


@dataclass(slots=True, kw_only=True)
class _Writer:
    """Writes tensors chunk by chunk, then the index of what was written."""

    folder: Path
    config: ModelConfig
    source: TensorSource
    dtype: torch.dtype | None
    layers: Layers
    report: Callable[[int], None]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    states: dict[str, Stretch] = field(default_factory=dict)
    _number: int = 0
    _offset: int = 0
    _restored: set[tuple[str, Box]] = field(default_factory=set)

    def restore(self) -> None:
        """Take over the files that an interrupted writer finished, and delete what else it left."""
        path = self.folder / WRITTEN
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = list(itertools.takewhile(self._take_over, lines))
        kept = {f"__0_{number}.distcp" for number in range(len(whole))}
        for file in self.folder.iterdir():
            if file.name not in kept:
                file.unlink()
        _write_file(path, b"".join(whole))

    def _take_over(self, line: bytes) -> bool:
        """The chunks of one finished file; False where the line or the file is not whole."""
        path = self.folder / self._file
        if not line.endswith(b"\n") or not path.is_file():
            return False
        try:
            record = json.loads(line)
        except ValueError:
            return False
        if path.stat().st_size != record["num_bytes"]:
            return False
        for key, shape, dtype, ranges, offset, length in record["chunks"]:
            box = Box(tuple((low, high) for low, high in ranges))
            stretch = Stretch(file=self._file, offset=offset, length=length)
            self._add(key, tuple(shape), getattr(torch, dtype), box, stretch)
            self._restored.add((key, box))
        self._number += 1
        return True

    def _finish_file(self) -> None:
        """Force the file to disk, and note what is in it."""
        _sync(self.folder / self._file)
        chunks = [
            (key, stored.shape, str(stored.dtype).removeprefix("torch."), box.ranges, at.offset, at.length)
            for key, stored in self.tensors.items()
            for box, at in stored.chunks
            if at.file == self._file
        ]
        line = json.dumps({"num_bytes": self._offset, "chunks": chunks}) + "\n"
        with (self.folder / WRITTEN).open("ab") as stream:
            stream.write(line.encode())
        self._number, self._offset = self._number + 1, 0

    def write(self, weight_map: WeightMap) -> None:
        """Write every tensor of the map, the empty states that modules ask for, and ``.metadata``."""
        kept = weight_map.hf_dtypes()
        by_name: dict[str, list[Piece]] = {}
        for piece in weight_map.of_rank(0).pieces:
            by_name.setdefault(piece.local.name, []).append(piece)
        empty = self._append([None])
        for name, pieces in by_name.items():
            is_kept = self.dtype is not None and pieces[0].hf.name in kept
            dtype = torch.float32 if is_kept else self.dtype
            self._write_tensor(name, pieces, dtype)
            for key, number in extra_state(self.config, name):
                self.states |= dict.fromkeys(self._state_keys(key, number), empty)
        _sync(self.folder / self._file)
        _write_file(self.folder / ".metadata", dump_metadata(self.tensors, self.states))

    @property
    def _file(self) -> str:
        return f"__0_{self._number}.distcp"

    def _append(self, value: object) -> Stretch:
        if self._offset > FILE_BYTES:
            self._finish_file()
        with (self.folder / self._file).open("ab") as stream:
            dump_into(value, stream)
            length = stream.tell() - self._offset
        stretch = Stretch(file=self._file, offset=self._offset, length=length)
        self._offset += length
        return stretch

    def _write_tensor(self, name: str, pieces: list[Piece], dtype: torch.dtype | None) -> None:
        view = pieces[0].local
        layer, _ = split_layer(name)
        is_stacked = self.layers == "stacked" and layer is not None
        keys = written_names(self.config, name)
        shape = view.shape
        if is_stacked:
            keys = tuple(LAYERS + split_layer(key)[1] for key in keys)
            shape = (self.config.num_layers, *view.shape)
        for box in _cuts(view):
            place = Box(((layer, layer + 1), *box.ranges)) if is_stacked and layer is not None else box
            if all((key, place) in self._restored for key in keys):
                dtype = self.tensors[keys[0]].dtype
            else:
                values = self._assemble(view, box, pieces, dtype)
                dtype = values.dtype
                stretch = self._append(values[None] if is_stacked else values)
                for key in keys:
                    self._add(key, shape, dtype, place, stretch)
            self.report(box.num_elements * dtype.itemsize)

    def _add(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, box: Box, stretch: Stretch) -> None:
        before = self.tensors.get(key)
        if before is not None and before.dtype != dtype:
            raise WeightError(f"{key}: {before.dtype} and {dtype} in one tensor; give a dtype")
        chunks = (*(before.chunks if before else ()), (box, stretch))
        self.tensors[key] = StoredTensor(shape=shape, dtype=dtype, chunks=chunks)

    def _assemble(self, view: View, box: Box, pieces: list[Piece], dtype: torch.dtype | None) -> torch.Tensor:
        """``box`` of a stored tensor, from the Hugging Face tensors that it is made of."""
        out: torch.Tensor | None = None
        copied = 0
        for piece in _pieces_in(box, pieces):
            values = self.source.read(piece.hf.name, piece.stored)
            if out is None:
                out = torch.empty(box.shape, dtype=dtype or values.dtype)
            elif dtype is None and values.dtype != out.dtype:
                raise WeightError(
                    f"{piece.hf.name} is {values.dtype} and belongs to {view.name}, of which other parts "
                    f"are {out.dtype}; give the dtype to write"
                )
            target = Extent(stored=box, view=piece.local, box=piece.local_box)
            source = Extent(stored=piece.stored, view=piece.hf, box=piece.hf_box)
            copied += sum(copy(out, target, values, source, each) for each in overlaps(target, source))
        assert out is not None and copied == out.numel(), f"{view.name}: {copied} elements of {box}"
        return out

    def _state_keys(self, key: str, number: int) -> Iterator[str]:
        """The keys of an object of each layer or expert: where it lies among how many."""
        layer, suffix = split_layer(key)
        index, among = [], []
        if self.layers == "stacked" and layer is not None:
            key, index, among = LAYERS + suffix, [layer], [self.config.num_layers]
        for expert in range(number or 1):
            at, of = ([*index, expert], [*among, number]) if number else (index or [0], among or [1])
            yield f"{key}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, of))}"


def _pieces_in(box: Box, pieces: list[Piece]) -> Iterator[Piece]:
    """The parts of pieces that lie in a box of the tensor they belong to, each simple."""
    for piece in pieces:
        for part in view_boxes(piece.local, box):
            local = part.intersect(piece.local_box)
            if local is None:
                continue
            offset = local.relative_to(piece.local_box)
            hf = zip(offset.ranges, piece.hf_box.ranges, strict=True)
            hf_box = Box(tuple((low + start, low + stop) for (start, stop), (low, _) in hf))
            yield from Piece(hf=piece.hf, hf_box=hf_box, local=piece.local, local_box=local).simple()


def _cuts(view: View) -> Iterator[Box]:
    """A tensor in boxes of at most ``CHUNK_BYTES`` of float32, or a row; of whole outermost factors where
    that is less than a box.
    """
    rows, inner = view.shape[0], view.shape[0] // view.factors[0][0]
    step = max(1, CHUNK_BYTES // max(1, 4 * torch.Size(view.shape[1:]).numel()))
    step -= step % inner if step >= inner else 0
    for start in range(0, rows, step):
        yield Box(((start, min(start + step, rows)), *((0, size) for size in view.shape[1:])))


def _content(layers: Layers) -> dict[str, bool]:
    """What Megatron-LM hands to ``sharded_state_dict`` when it loads: how keys are made."""
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": layers == "separate",
    }


def _arguments(config: ModelConfig) -> dict[str, object]:
    """Megatron-LM's arguments of this model, for ``--use-checkpoint-args`` and its own check."""
    moe, found = config.moe, dict[str, object]()
    found |= {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_kv_heads != config.num_attention_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": config.rope.theta,
        "rotary_percent": config.rope.fraction,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_eps,
        "swiglu": True,
        "add_bias_linear": config.linear_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm != "none" or config.mla is not None,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "multi_latent_attention": config.mla is not None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
    }
    if moe is not None:
        found |= {
            "num_experts": moe.num_experts,
            "moe_ffn_hidden_size": moe.expert_hidden_size,
            "moe_router_topk": moe.top_k,
            "moe_router_score_function": moe.score,
            "moe_router_pre_softmax": not moe.normalize_top_k,
            "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
            "moe_router_enable_expert_bias": moe.selection_bias,
            "moe_shared_expert_intermediate_size": moe.shared_hidden_size or None,
            "moe_layer_freq": [int(layer in moe.moe_layers) for layer in range(config.num_layers)],
        }
    return found


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
