"""From a family's table and a backend's places to the pieces that each rank holds. Pure.

``WeightMap`` is the one description of where weights live; loading, exporting, checkpoints and the
push read it and never look at parameter names themselves.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mtrl.models.boxes import Box, Padding, Piece, Place, Range, View
from mtrl.models.config import ModelConfig
from mtrl.models.families import Weight, family_named
from mtrl.models.roles import ROLE_SYMBOLS, SHARDED_BY, Role
from mtrl.models.stages import Stages
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankCoordinates, RankLayout
from mtrl.parallel.spec import ParallelSpec

Places = Mapping[Role, Place]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWeights:
    """What one rank holds: pieces of the checkpoint, and padding."""

    pieces: tuple[Piece, ...]
    paddings: tuple[Padding, ...]


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up so that ``tp`` ranks hold equally many rows."""
    return math.ceil(vocab_size / tp) * tp


def check_model_fits(config: ModelConfig, spec: ParallelSpec) -> None:
    """Check every size that an axis of ``spec`` divides.

    Raises:
        LayoutError: one does not divide; the message has the numbers and the values that would fit.
    """
    tp, ep, etp = spec.attn.tp, spec.ffn.ep, spec.ffn.etp
    needs = [
        (config.num_attention_heads, tp, "attention heads", "attn t"),
        (config.num_kv_heads, tp, "KV heads", "attn t"),
    ]
    if config.dense_layers:
        needs.append((config.intermediate_size, tp, "MLP hidden size", "attn t"))
    if config.moe and config.moe.shared_hidden_size:
        needs.append((config.moe.shared_hidden_size, tp, "shared expert hidden size", "attn t"))
    if config.moe:
        needs.append((config.moe.num_experts, ep, "experts", "ffn e"))
        needs.append((config.moe.expert_hidden_size, etp, "expert hidden size", "ffn t"))
    elif ep > 1:
        raise LayoutError(f"{spec}: e{ep} asks for expert parallelism, but {config.family} has no experts")
    for size, ways, what, axis in needs:
        if size % ways:
            fits = [str(n) for n in range(1, size + 1) if size % n == 0 and n <= 2 * ways]
            raise LayoutError(
                f"{spec}: {what} {size} cannot be split {axis}{ways} ways; use {', '.join(fits)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Where every element of every weight lives, for all ranks of a layout.

    ``places`` says where a backend keeps each role, ``dense_places`` where the layers with a dense MLP keep
    some of them instead. ``format_number`` 0 is the family's published format; others count its
    ``other_formats``. Ranks' weights are computed when asked for.
    """

    config: ModelConfig
    layout: RankLayout
    stages: Stages
    places: Places
    dense_places: Places = field(default_factory=dict)
    format_number: int = 0
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What follows from the map and is computed once, here and by others."""

    @property
    def table(self) -> tuple[Weight, ...]:
        """The family's weight table of this format."""
        family = family_named(self.config.family)
        if self.format_number == 0:
            return family.weights(self.config)
        return family.other_formats(self.config)[self.format_number - 1]

    def formats(self) -> "Iterator[WeightMap]":
        """The same weights in every format the family reads, the published one first."""
        for number in range(1 + len(family_named(self.config.family).other_formats(self.config))):
            yield replace(self, format_number=number, memo={})

    def in_format_of(self, names: Collection[str]) -> "WeightMap":
        """The map of the format that has most of a source's names; the published one where several tie."""
        return max(self.formats(), key=lambda each: sum(name in names for name in each.hf_shapes()))

    def of_rank(self, rank: int) -> RankWeights:
        """The pieces and padding of one rank."""
        key = ("of_rank", rank)
        if key not in self.memo:
            entries = tuple(self._entries(self.layout.coordinates(rank)))
            self.memo[key] = RankWeights(
                pieces=tuple(entry for entry in entries if isinstance(entry, Piece)),
                paddings=tuple(entry for entry in entries if isinstance(entry, Padding)),
            )
        found: RankWeights = self.memo[key]
        return found

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the Hugging Face checkpoint, in the table's order."""
        if "hf_shapes" not in self.memo:
            self.memo["hf_shapes"] = {view.name: view.shape for _, view in self._hf_views()}
        return dict(self.memo["hf_shapes"])

    def hf_dtypes(self) -> dict[str, str]:
        """The tensors that have one dtype whatever the others are written in."""
        return {view.name: weight.dtype for weight, view in self._hf_views() if weight.dtype}

    def _hf_views(self) -> Iterator[tuple[Weight, View]]:
        extents = self.config.extents()
        for weight in self.table:
            symbols = ROLE_SYMBOLS[weight.role]
            experts = range(extents["e"]) if "{expert}" in weight.place.name else range(1)
            for layer in weight.layers if weight.layers is not None else (0,):
                for expert in experts:
                    yield weight, weight.place.view(symbols, extents, layer=layer, expert=expert)

    def _entries(self, at: RankCoordinates) -> Iterator[Piece | Padding]:
        table = self.table
        for chunk in range(self.stages.num_chunks):
            first, last = self.stages.is_first(at.pp, chunk), self.stages.is_last(at.pp, chunk)
            layers = self.stages.chunk_layers(at.pp, chunk)
            for weight in table:
                if weight.layers is not None:
                    for local_layer, layer in enumerate(layers):
                        if layer in weight.layers:
                            yield from self._pieces(weight, at, chunk, layer, local_layer)
                elif self._chunk_has(weight.role, first, last):
                    yield from self._pieces(weight, at, chunk, 0, 0)

    def _chunk_has(self, role: Role, first: bool, last: bool) -> bool:
        if role == "embedding":
            return first
        if role == "lm_head" and self.config.tie_embeddings:
            # One parameter serves both ends when one chunk holds both; else the last has a copy.
            return last and not first
        return last

    def _pieces(
        self, weight: Weight, at: RankCoordinates, chunk: int, layer: int, local_layer: int
    ) -> Iterator[Piece | Padding]:
        symbols, place = ROLE_SYMBOLS[weight.role], self._place(weight, layer)
        hf_extents, local_extents, ranges = self.config.extents(), self.config.extents(), {}
        for symbol in symbols:
            ranges[symbol], local_extents[symbol] = self._share(symbol, hf_extents[symbol], at)
        local_ranges = {symbol: (0, stop - start) for symbol, (start, stop) in ranges.items()}
        if "v" in symbols and ranges["v"][1] - ranges["v"][0] < local_extents["v"]:
            view = place.view(symbols, local_extents, layer=local_layer, expert=0)
            rows = {**local_ranges, "v": (local_ranges["v"][1], local_extents["v"])}
            yield Padding(local=view, local_box=place.box(symbols, rows), chunk=chunk)
        each = "{expert}" in weight.place.name or "{expert}" in place.name
        start, stop = ranges.get("e", (0, 1))
        for expert in range(start, stop) if each else (start,):
            if each:
                ranges["e"], local_ranges["e"] = (expert, expert + 1), (expert - start, expert - start + 1)
            if any(low >= high for low, high in ranges.values()):
                continue  # a rank whose share of the vocabulary is all padding
            yield Piece(
                hf=weight.place.view(symbols, hf_extents, layer=layer, expert=expert),
                hf_box=weight.place.box(symbols, ranges),
                local=place.view(symbols, local_extents, layer=local_layer, expert=expert - start),
                local_box=place.box(symbols, local_ranges),
                chunk=chunk,
            )

    def _place(self, weight: Weight, layer: int) -> Place:
        is_elsewhere = weight.layers is not None and weight.role in self.dense_places
        if is_elsewhere and layer not in self.config.moe_layers:
            return self.dense_places[weight.role]
        return self.places[weight.role]

    def _share(self, symbol: str, extent: int, at: RankCoordinates) -> tuple[Range, int]:
        """A rank's range of a symbol, and the extent it has there with padding."""
        axis = SHARDED_BY.get(symbol)
        spec = self.layout.spec
        index, size = {
            None: (0, 1),
            "attn.tp": (at.tp, spec.attn.tp),
            "ffn.ep": (at.ep, spec.ffn.ep),
            "ffn.etp": (at.etp, spec.ffn.etp),
        }[axis]
        whole = padded_vocab_size(extent, size) if symbol == "v" else extent
        local = whole // size
        assert local * size == whole, f"{symbol}: {whole} over {size}; check_model_fits comes first"
        start = min(index * local, extent)
        return (start, min(start + local, extent)), local


def owned_boxes(pieces: tuple[Piece, ...]) -> dict[str, tuple[Box, ...]]:
    """The distinct stored boxes of each Hugging Face tensor among simple pieces."""
    boxes: dict[str, dict[Box, None]] = {}
    for piece in pieces:
        for simple in piece.simple():
            boxes.setdefault(piece.hf.name, {})[simple.stored] = None
    return {name: tuple(found) for name, found in boxes.items()}
