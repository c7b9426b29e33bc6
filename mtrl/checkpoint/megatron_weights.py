"""Weights from Megatron's own ``torch_dist`` checkpoints, by Hugging Face names."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mtrl.checkpoint.chunk_boxes import Extent, copy, first_dim, overlaps
from mtrl.checkpoint.megatron_names import is_of_model, parts, places
from mtrl.checkpoint.torch_dist import Index, Stretch, read_chunk, read_common, read_index, step_folder
from mtrl.models.boxes import Box, Piece, View
from mtrl.models.config import ModelConfig
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import ModelError, WeightError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec

CACHE_BYTES = 128 * 2**20


def checkpoint_map(config: ModelConfig) -> WeightMap:
    """The weights of a whole model as Megatron's checkpoints name them: one process's, in whole tensors.

    Raises:
        ModelError: Megatron has no key for a part of the model.
    """
    layout = RankLayout.from_spec(parse_training_spec("megatron:d1"))
    stages = Stages.balanced(config.num_layers, 1, 1)
    return WeightMap(config=config, layout=layout, stages=stages, places=places(config))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """A stored chunk: ``inner`` of it is ``box`` of the tensor that it belongs to, in the one form."""

    box: Box
    inner: Box
    shape: tuple[int, ...]
    dtype: torch.dtype
    stretch: Stretch


class TorchDistSource:
    """A ``torch_dist`` checkpoint's weights by Hugging Face names, read chunk by chunk. A context manager.

    ``folder`` is the checkpoint (``iter_XXXXXXX``) or the folder above it, whose tracker file is followed.
    Optimizer states and counters are not read. Stored chunks of up to `CACHE_BYTES`, or one, are kept beside
    what is read: neighbours, such as an expert's halves and all experts' outputs, come out of few.
    ``leave_out`` are prefixes of Megatron's keys that are passed over, such as ``"mtp."``. Names are those of
    the family's format that has most of ``names``; the published one's where none are given.

    Raises:
        ModelError: the folder cannot be read, is malformed, or pickles what is not on the list; or its
            model differs from ``config`` in what its weights mean.
        WeightError: tensors are missing, unknown, of another shape, or stored twice.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        leave_out: tuple[str, ...] = (),
        names: Collection[str] = (),
    ) -> None:
        self.folder, self.config, self.leave_out = folder, config, leave_out
        self._map = checkpoint_map(config).in_format_of(names)
        self._pieces: dict[str, list[Piece]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._cache: dict[Stretch, torch.Tensor] = {}  # the least recently used first

    def __enter__(self) -> Self:
        index = read_index(step_folder(self.folder))
        self.folder = index.folder
        _check_meaning(read_common(index), self.config, self.folder)
        views: dict[str, View] = {}
        for piece in self._map.of_rank(0).pieces:
            self._pieces.setdefault(piece.hf.name, []).append(piece)
            views[piece.local.name] = piece.local
        self._chunks = _chunks_by_name(index, self.leave_out)
        _check_chunks(self._chunks, views, self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, as the family publishes them."""
        return self._map.hf_shapes()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor in the checkpoint."""
        return {name: self._chunks[pieces[0].local.name][0].dtype for name, pieces in self._pieces.items()}

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box`` of tensor ``name``, in the dtype of the checkpoint."""
        dtype = self._chunks[self._pieces[name][0].local.name][0].dtype
        out, copied = torch.empty(box.shape, dtype=dtype), 0
        for piece in self._pieces[name]:
            target = Extent(stored=box, view=piece.hf, box=piece.hf_box)
            low, high = first_dim(piece.local, piece.local_box)
            for chunk in self._chunks[piece.local.name]:
                start, stop = chunk.box.ranges[0]
                if start < high and low < stop:
                    copied += self._copy(out, target, chunk, piece)
        assert copied == box.num_elements, f"{name}: found {copied} of {box.num_elements} elements"
        return out

    def _copy(self, out: torch.Tensor, target: Extent, chunk: _Chunk, piece: Piece) -> int:
        """Copy what a chunk holds of a piece; the chunk is read only if it holds any."""
        stored = chunk.box.intersect(Box.full(piece.local.shape))
        if stored is None:  # all padding
            return 0
        source = Extent(stored=stored, view=piece.local, box=piece.local_box)
        shared = overlaps(target, source)
        if not shared:
            return 0
        values = self._values(chunk)[chunk.inner.slices].reshape(chunk.box.shape)
        values = values[stored.relative_to(chunk.box).slices]
        return sum(copy(out, target, values, source, each) for each in shared)

    def _values(self, chunk: _Chunk) -> torch.Tensor:
        """The whole stored chunk."""
        found = self._cache.pop(chunk.stretch, None)
        if found is None:
            # Freed before the next is read.
            while self._cache and _held(self._cache) + chunk.stretch.length > CACHE_BYTES:
                del self._cache[next(iter(self._cache))]
            found = read_chunk(self.folder, chunk.stretch, chunk.shape, chunk.dtype)
        self._cache[chunk.stretch] = found
        return found


def _held(cache: Mapping[Stretch, torch.Tensor]) -> int:
    return sum(each.nbytes for each in cache.values())


def _chunks_by_name(index: Index, leave_out: tuple[str, ...]) -> dict[str, list[_Chunk]]:
    """The model's chunks by the one form's names; a norm that is stored under two keys counts once."""
    found: dict[str, dict[Box, _Chunk]] = {}
    for key, stored in index.tensors.items():
        if not is_of_model(key) or key.startswith(leave_out):
            continue
        for box, stretch in stored.chunks:
            for part in parts(key, stored.shape, box):
                chunk = _Chunk(
                    box=part.box, inner=part.inner, shape=box.shape, dtype=stored.dtype, stretch=stretch
                )
                found.setdefault(part.name, {}).setdefault(part.box, chunk)
    return {name: sorted(each.values(), key=lambda chunk: chunk.box.ranges) for name, each in found.items()}


def _check_chunks(chunks: Mapping[str, list[_Chunk]], views: Mapping[str, View], folder: Path) -> None:
    """Check that chunks hold every element of every weight once, and that no other tensor is there."""
    problems = [f"missing: {name} {view.shape}" for name, view in views.items() if name not in chunks]
    problems += [f"unknown: {name} {_span(found)}" for name, found in chunks.items() if name not in views]
    for name, view in views.items():
        problems += _problems(name, chunks[name], view) if name in chunks else []
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightError(
            f"{folder} does not hold the weights that config.json describes ({len(problems)} problems):\n"
            f"  {shown}{more}\nGive the config.json of this very model"
        )


def _problems(name: str, chunks: list[_Chunk], view: View) -> Iterator[str]:
    shape = _span(chunks)
    is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
    padded = shape[:1] > view.shape[:1] and shape[1:] == view.shape[1:] and is_vocabulary
    if shape != view.shape and not padded:
        yield f"shape of {name}: {shape}, config.json implies {view.shape}"
    if len({chunk.dtype for chunk in chunks}) > 1:
        yield f"{name} is stored in several dtypes"
    # Sorted by the first dim: only chunks that begin before this one ends can overlap it.
    for number, chunk in enumerate(chunks):
        for other in chunks[number + 1 :]:
            if other.box.ranges[0][0] >= chunk.box.ranges[0][1]:
                break
            if chunk.box.intersect(other.box) is not None:
                yield f"{name} is stored twice: {chunk.box.ranges} and {other.box.ranges}"
    held = sum(chunk.box.num_elements for chunk in chunks)
    if held != torch.Size(shape).numel():
        yield f"{name} is stored in part: {held} of {torch.Size(shape).numel()} elements"


def _span(chunks: list[_Chunk]) -> tuple[int, ...]:
    """The shape that chunks reach to."""
    stops = ([stop for _, stop in chunk.box.ranges] for chunk in chunks)
    return tuple(max(each) for each in zip(*stops, strict=True))


def _check_meaning(common: Mapping[str, Any], config: ModelConfig, folder: Path) -> None:
    """Check what arguments say about weights that shapes do not show.

    Raises:
        ModelError: heads or groups differ from the config's, or weights are stored in another form.
    """
    version = common.get("checkpoint_version", 3.0)
    if not isinstance(version, int | float) or version < 2.0:
        raise ModelError(f"{folder}: checkpoint_version {version} orders heads otherwise; only 2.0 and later")
    args = getattr(common.get("args"), "state", None)
    if not isinstance(args, dict):
        return
    expected: dict[str, object] = {"num_attention_heads": config.num_attention_heads}
    if args.get("group_query_attention"):
        expected["num_query_groups"] = config.num_kv_heads
    if config.mla is None:
        expected |= {"kv_channels": config.head_dim, "rotary_interleaved": False}
    forms = ("apply_layernorm_1p", "moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")
    for name, wanted in {**expected, **dict.fromkeys(forms, None)}.items():
        found = args.get(name)
        if found != wanted and found not in (None, False):
            raise ModelError(f"{folder} was written with {name} {found}; config.json's model has {wanted}")
