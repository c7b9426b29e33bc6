"""What has to travel for an engine to hold the trainer's weights, as views prepared once.

``needs`` says what a rank's engine reads of each Hugging Face tensor, from the record of vLLM's own loader.
The plan gives each needed element one source, the rank itself where it can, so that a rank receives exactly
the elements of need minus have. From the plan come lists of views of live tensors, the trainer's and the
engine's, and of flat buckets between them; a push is then a few calls on those lists (``execute.py``).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mtrl.models.boxes import Box, Piece
from mtrl.models.builder import Model
from mtrl.models.flat_ranges import boxes_of_range
from mtrl.models.gather import held_boxes
from mtrl.models.pieces import stored_region
from mtrl.models.transfers import Boxes, Transfer, TransferPlan, plan_transfers
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.agreement import gather_json
from mtrl.rollout.loader_record import LoaderRecord, RecordedCopy

Pairs = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one rank's engine reads: ``boxes``, disjoint, of each tensor; ``copies`` of each with their boxes.

    ``whole`` are tensors of which some copy reads what is no box (a transposed or repeated part): those are
    needed in full, and its loader's record is replayed on them.
    """

    boxes: dict[str, tuple[Box, ...]]
    copies: dict[str, tuple[tuple[Box, RecordedCopy], ...]]
    whole: frozenset[str]

    @classmethod
    def of(cls, record: LoaderRecord) -> "Needs":
        """From the record of a loader."""
        boxes: dict[str, list[Box]] = {}
        copies: dict[str, list[tuple[Box, RecordedCopy]]] = {}
        whole: set[str] = set()
        for copy in record.copies:
            ranges = copy.source_region.box(record.sources[copy.source])
            if ranges is None:
                whole.add(copy.source)
                continue
            copies.setdefault(copy.source, []).append((Box(ranges), copy))
            boxes.setdefault(copy.source, []).append(Box(ranges))
        for name in whole:
            copies.pop(name, None)
            boxes[name] = [Box.full(record.sources[name])]
        return cls(
            boxes={name: tuple(disjoint(held)) for name, held in boxes.items()},
            copies={name: tuple(found) for name, found in copies.items()},
            whole=frozenset(whole),
        )


def disjoint(boxes: Iterable[Box]) -> list[Box]:
    """The elements of ``boxes`` in boxes that do not overlap."""
    kept: list[Box] = []
    for box in dict.fromkeys(boxes):
        rest = [box]
        for other in kept:
            rest = [part for each in rest for part in each.subtract(other)]
        kept.extend(rest)
    return kept


def plan_push(weight_map: WeightMap, needs: Sequence[Boxes]) -> TransferPlan:
    """Who sends which box to whom; ``needs[r]`` are rank r's. Pure; every rank computes the same."""
    names = [name for name in weight_map.hf_shapes() if any(name in need for need in needs)]
    return plan_transfers(names, held_boxes(weight_map), needs)


def exchange_needs(needs: Needs) -> list[Boxes]:
    """All ranks' needed boxes. Collective over WORLD."""
    own = {name: [box.ranges for box in held] for name, held in needs.boxes.items()}
    return [
        {name: tuple(Box(tuple((a, b) for a, b in ranges)) for ranges in held) for name, held in each.items()}
        for each in gather_json(own)
    ]


@dataclass(slots=True)
class Round:
    """Views for one exchange: ``local`` pairs need no wire; ``outgoing`` fill ``sent``, ``incoming`` empty
    ``received``. Each is (destinations, sources). Sizes are elements for each rank, in rank order;
    ``travels`` is whether anything goes from any rank to another.
    """

    travels: bool

    sent: Tensor
    received: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    local: Pairs = field(default_factory=lambda: ([], []))
    outgoing: Pairs = field(default_factory=lambda: ([], []))
    incoming: Pairs = field(default_factory=lambda: ([], []))


@dataclass(slots=True)
class Views:
    """Makes views of boxes of Hugging Face tensors in live tensors: this rank's trainer and engine."""

    model: Model
    needs: Needs
    destinations: Mapping[str, Tensor]
    staging: Mapping[str, Tensor]
    _pieces: dict[str, list[tuple[Box, Piece]]] = field(init=False)
    _tensors: Mapping[Any, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._tensors, self._pieces = self.model.tensors(), {}
        for piece in self.model.weight_map.of_rank(self.model.groups.rank).pieces:
            for simple in piece.simple():
                self._pieces.setdefault(simple.hf.name, []).append((simple.stored, simple))

    def held(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """The trainer's elements of ``box``: parts of it, each with a view of its elements in some shape
        whose row-major order is that of the part.
        """
        held, piece = next((h, p) for h, p in self._pieces[name] if h.intersect(box) == box)
        region = stored_region(self._tensors, piece)
        lengths = _grouped(tuple(region.shape), [len(factors) for factors in piece.hf.factors])
        for part, factors in _factor_boxes(lengths, box.relative_to(held)):
            ranges = zip(part.ranges, held.ranges, strict=True)
            yield Box(tuple((low + a, low + b) for (a, b), (low, _) in ranges)), region[factors.slices]

    def wanted(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Where the engine wants the elements of ``box``: parts of it, each with a view of that part's
        shape.
        """
        if name in self.staging:
            yield box, self.staging[name][box.slices]
            return
        for source, copy in self.needs.copies[name]:
            common = source.intersect(box)
            if common is not None:
                view = copy.destination_region.of(self.destinations[copy.destination]).view(source.shape)
                yield common, view[common.relative_to(source).slices]


def _grouped(shape: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    sizes = iter(shape)
    return [tuple(itertools.islice(sizes, count)) for count in counts]


def _factor_boxes(lengths: Sequence[tuple[int, ...]], box: Box) -> Iterator[tuple[Box, Box]]:
    """Cut ``box`` of a tensor whose dims are split into factors into boxes of the factors.

    Yields each as a box of the tensor and as one of all factors in sequence.
    """
    cuts: list[list[tuple[tuple[int, int], Box]]] = []
    for factors, (start, stop) in zip(lengths, box.ranges, strict=True):
        parts, at = [], start
        for part in boxes_of_range(factors, start, stop):
            parts.append(((at, at + part.num_elements), part))
            at += part.num_elements
        cuts.append(parts)
    for chosen in itertools.product(*cuts):
        whole = Box(tuple(part_range for part_range, _ in chosen))
        yield whole, Box(tuple(itertools.chain.from_iterable(part.ranges for _, part in chosen)))


def make_rounds(
    plan: TransferPlan, views: Views, dtype: torch.dtype, *, rank: int, world_size: int, bucket_bytes: int
) -> list[Round]:
    """The plan as views, cut by tensors so that no rank's bucket of a round is larger than ``bucket_bytes``.

    A tensor larger than that has a round of its own.
    """
    groups = list(_cut(plan.transfers, world_size, bucket_bytes // dtype.itemsize))
    travelling = [[t for t in group if t.source != t.target] for group in groups]
    device = next(iter(views.model.parameters().values())).device

    def bucket(end: Literal["source", "target"]) -> Tensor:
        """One for all rounds, which take turns."""
        sizes = [sum(t.box.num_elements for t in group if getattr(t, end) == rank) for group in travelling]
        return torch.empty(max(sizes, default=0), dtype=dtype, device=device)

    sent, received = bucket("source"), bucket("target")
    return [_round(group, views, sent, received, rank, world_size) for group in groups]


def _cut(transfers: Sequence[Transfer], world_size: int, limit: int) -> Iterator[list[Transfer]]:
    group: list[Transfer] = []
    sent, received = [0] * world_size, [0] * world_size
    for _, run in itertools.groupby(transfers, key=lambda transfer: transfer.name):
        members = list(run)
        travelling = [each for each in members if each.source != each.target]
        for each in travelling:
            sent[each.source] += each.box.num_elements
            received[each.target] += each.box.num_elements
        if group and max(*sent, *received) > limit:
            yield group
            group, sent, received = [], [0] * world_size, [0] * world_size
            for each in travelling:
                sent[each.source] += each.box.num_elements
                received[each.target] += each.box.num_elements
        group.extend(members)
    if group:
        yield group


def _round(
    transfers: Sequence[Transfer],
    views: Views,
    sent: Tensor,
    received: Tensor,
    rank: int,
    world_size: int,
) -> Round:
    sends = [
        [t for t in transfers if t.source == rank != t.target and t.target == r] for r in range(world_size)
    ]
    gets = [
        [t for t in transfers if t.target == rank != t.source and t.source == r] for r in range(world_size)
    ]
    sizes = [[sum(t.box.num_elements for t in each) for each in side] for side in (sends, gets)]
    found = Round(
        travels=any(t.source != t.target for t in transfers),
        sent=sent[: sum(sizes[0])],
        received=received[: sum(sizes[1])],
        send_sizes=sizes[0],
        receive_sizes=sizes[1],
    )
    offset = 0
    for transfer in itertools.chain.from_iterable(sends):
        bucket = found.sent[offset : (offset := offset + transfer.box.num_elements)].view(transfer.box.shape)
        for part, source in views.held(transfer.name, transfer.box):
            _pair(found.outgoing, bucket[part.relative_to(transfer.box).slices], source)
    offset = 0
    for transfer in itertools.chain.from_iterable(gets):
        bucket = found.received[offset : (offset := offset + transfer.box.num_elements)].view(
            transfer.box.shape
        )
        for part, target in views.wanted(transfer.name, transfer.box):
            _pair(found.incoming, target, bucket[part.relative_to(transfer.box).slices])
    for transfer in transfers:
        if transfer.source == transfer.target == rank:
            for wanted, target in views.wanted(transfer.name, transfer.box):
                for part, source in views.held(transfer.name, wanted):
                    _pair(found.local, target[part.relative_to(wanted).slices], source)
    found.local, found.outgoing, found.incoming = map(
        coalesced, (found.local, found.outgoing, found.incoming)
    )
    return found


def coalesced(pairs: Pairs) -> Pairs:
    """The same copies in fewer: those that follow each other in memory on both sides become one.

    Experts, and their gates and ups, often lie in the same order in trainer and engine.
    """
    flat: list[tuple[Tensor, Tensor]] = []
    rest: Pairs = ([], [])
    for destination, source in zip(*pairs, strict=True):
        if destination.is_contiguous() and source.is_contiguous() and destination.dtype == source.dtype:
            flat.append((destination.view(-1), source.view(-1)))
        else:
            rest[0].append(destination)
            rest[1].append(source)
    flat.sort(key=lambda pair: (pair[0].untyped_storage().data_ptr(), pair[0].storage_offset()))
    for run in _runs(flat):
        size = sum(destination.numel() for destination, _ in run)
        for side, tensor in zip(rest, run[0], strict=True):
            side.append(tensor.as_strided((size,), (1,), tensor.storage_offset()))
    return rest


def _runs(flat: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    run: list[tuple[Tensor, Tensor]] = []
    for pair in flat:
        if run and not all(_follows(now, last) for now, last in zip(pair, run[-1], strict=True)):
            yield run
            run = []
        run.append(pair)
    if run:
        yield run


def _follows(tensor: Tensor, last: Tensor) -> bool:
    """Whether it begins where ``last`` ends, in the same storage."""
    same = tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and tensor.storage_offset() == last.storage_offset() + last.numel()


def _pair(pairs: Pairs, destination: Tensor, source: Tensor) -> None:
    """Both in the shape that has more dims: splitting a dim needs no copy, joining two may."""
    assert destination.numel() == source.numel() == math.prod(source.shape)
    if destination.dim() < source.dim():
        destination = destination.view(source.shape)
    elif destination.shape != source.shape:
        source = source.view(destination.shape)
    pairs[0].append(destination)
    pairs[1].append(source)
