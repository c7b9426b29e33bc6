"""Boxes applied to tensors: read a piece out of a local parameter, or write one into it."""

from collections.abc import Mapping

import torch

from mtrl.models.boxes import Box, Padding, Piece, View
from mtrl.models.flat_ranges import RangePiece
from mtrl.models.weight_map import RankWeights
from mtrl.parallel.errors import WeightError

Tensors = Mapping[tuple[int, str], torch.Tensor]


def view_of(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """``tensor`` (contiguous, ``view.shape``) with split and permuted dims; shares its memory."""
    return tensor.view(view.flat_factors).permute(view.order)


def local_region(tensors: Tensors, piece: Piece | Padding) -> torch.Tensor:
    """The part of the local parameter that a piece is; writing to it writes to the parameter."""
    tensor = tensors[(piece.chunk, piece.local.name)].detach()
    return view_of(tensor, piece.local)[piece.local_box.slices]


def read_stored(tensors: Tensors, piece: Piece) -> torch.Tensor:
    """A simple piece as a tensor of ``piece.stored.shape``, in the checkpoint's own dims."""
    region = local_region(tensors, piece)
    return _to_stored_dims(region, piece.hf).reshape(piece.stored.shape)


def stored_region(tensors: Tensors, piece: Piece) -> torch.Tensor:
    """A simple piece as a view in the checkpoint's factors: each stored dim is a run of its own dims."""
    return _to_stored_dims(local_region(tensors, piece), piece.hf)


def write_stored(tensors: Tensors, piece: Piece, stored: torch.Tensor) -> None:
    """Write ``stored`` (``piece.stored.shape``, any float dtype) into the parameter of a simple piece."""
    region = local_region(tensors, piece)
    target = _to_stored_dims(region, piece.hf)
    target.copy_(stored.reshape(target.shape))


def _to_stored_dims(region: torch.Tensor, hf: View) -> torch.Tensor:
    """Permute a region from the view's order of dims back to the stored tensor's factors."""
    inverse = [0] * len(hf.order)
    for position, factor in enumerate(hf.order):
        inverse[factor] = position
    return region.permute(inverse)


def fill_padding(tensors: Tensors, weights: RankWeights) -> None:
    """Give every padding region its value."""
    for padding in weights.paddings:
        local_region(tensors, padding).fill_(padding.value)


def check_coverage(tensors: Tensors, weights: RankWeights) -> None:
    """Check that pieces and padding cover every element of every local tensor exactly once.

    Raises:
        WeightError: a tensor is not in the table, a table row has no tensor, shapes differ, or
            elements are covered twice or not at all.
    """
    covered: dict[tuple[int, str], list[Box]] = {}
    entries: list[Piece | Padding] = [*weights.pieces, *weights.paddings]
    for entry in entries:
        key = (entry.chunk, entry.local.name)
        if key not in tensors:
            raise WeightError(f"the weight table names {entry.local.name}, which this model does not have")
        shape = tuple(tensors[key].shape)
        if shape != entry.local.shape:
            raise WeightError(f"{entry.local.name} is {shape}, the weight table says {entry.local.shape}")
        covered.setdefault(key, []).append(entry.local_box)
    unused = sorted(set(tensors) - set(covered))
    if unused:
        raise WeightError(f"no row of the weight table fills {', '.join(name for _, name in unused)}")
    for key, boxes in covered.items():
        num_elements = sum(box.num_elements for box in boxes)
        # Boxes of one parameter share its factors' extents, though not always its dims' names.
        overlap = any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i])
        if overlap or num_elements != tensors[key].numel():
            raise WeightError(f"{key[1]}: pieces cover {num_elements} of {tensors[key].numel()} elements")


def range_region(shard: torch.Tensor, part: RangePiece) -> torch.Tensor:
    """``part`` in the 1-d shard of its range, in the checkpoint's factors; shares its memory."""
    run = shard.detach()[part.offset : part.offset + part.run.num_elements].view(part.run.shape)
    region = run.permute(part.piece.local.order)[part.local_box.slices]
    return _to_stored_dims(region, part.piece.hf)
