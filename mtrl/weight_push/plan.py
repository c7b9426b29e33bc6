"""What has to travel for an engine to hold the trainer's weights, as views prepared once.

``needs`` says what a rank's engine reads of each Hugging Face tensor, from the record of vLLM's own loader.
The plan gives each needed element one source, the rank itself where it can, so that a rank receives exactly
the elements of need minus have. From the plan come lists of views of live tensors, the trainer's and the
engine's, and of flat buckets between them; a push is then a few calls on those lists (``execute.py``).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

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
from mtrl.rollout.kernel_layout import Ranges, in_dims_of, shifted
from mtrl.rollout.loader_record import LoaderRecord, RecordedCopy
from mtrl.rollout.weight_loading import Placed

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
    placed: Callable[[RecordedCopy, Ranges], Iterator[Placed]]
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
        """Where the engine wants the elements of ``box``: parts of it, each with a view of its elements in
        some shape whose row-major order is that of the part.
        """
        if name in self.staging:
            yield box, self.staging[name][box.slices]
            return
        for source, copy in self.needs.copies[name]:
            common = source.intersect(box)
            if common is None:
                continue
            shape, starts = copy.source_region.shape, [low for low, _ in source.ranges]
            for part, view in self.placed(
                copy, in_dims_of(shape, common.relative_to(source).ranges, source.shape)
            ):
                yield Box(shifted(in_dims_of(source.shape, part, shape), starts)), view

    def matched(self, name: str, box: Box) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the engine wants what the trainer holds: (target, source) views of the same elements."""
        for part, source in self.held(name, box):
            for wanted, target in self.wanted(name, part):
                if wanted == part and _common_shape(target.shape, source.shape) is not None:
                    yield target, source
                else:
                    for smaller in (wanted,) if wanted != part else _halves(part):
                        yield from self.matched(name, smaller)


def _halves(box: Box) -> tuple[Box, Box]:
    """Cut along the longest dim."""
    dim = max(range(len(box.ranges)), key=lambda each: box.shape[each])
    low, high = box.ranges[dim]
    middle = (low + high) // 2
    return tuple(  # type: ignore[return-value]
        Box((*box.ranges[:dim], part, *box.ranges[dim + 1 :])) for part in ((low, middle), (middle, high))
    )


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
            for target, source in views.matched(transfer.name, transfer.box):
                _pair(found.local, target, source)
    found.local, found.outgoing, found.incoming = map(
        coalesced, (found.local, found.outgoing, found.incoming)
    )
    return found


def coalesced(pairs: Pairs) -> Pairs:
    """The same copies in fewer: those that go on where another ends, or follow others at equal distances.

    Experts, and their gates and ups, often lie in the same order in trainer and engine.
    """
    flat: list[tuple[Tensor, Tensor]] = []
    rest: list[tuple[Tensor, Tensor]] = []
    for destination, source in zip(*pairs, strict=True):
        if destination.is_contiguous() and source.is_contiguous() and destination.dtype == source.dtype:
            flat.append((destination.view(-1), source.view(-1)))
        else:
            rest.append((destination, source))
    for run in _runs(sorted(flat, key=_place), lambda run, pair: _goes_on(run[-1], pair)):
        size = sum(destination.numel() for destination, _ in run)
        first, second = (tensor.as_strided((size,), (1,), tensor.storage_offset()) for tensor in run[0])
        rest.append((first, second))
    found: Pairs = ([], [])
    for run in _runs(sorted(rest, key=lambda pair: (_form(pair), _place(pair))), _is_next):
        if len(run) > 1:
            steps = _steps(run[0], run[1])
            run = [tuple(_stack(*each, len(run)) for each in zip(run[0], steps, strict=True))]  # type: ignore[list-item]
        for side, tensor in zip(found, run[0], strict=True):
            side.append(tensor)
    return found


Pair: TypeAlias = tuple[Tensor, Tensor]


def _runs(pairs: Sequence[Pair], belongs: Callable[[Sequence[Pair], Pair], bool]) -> Iterator[list[Pair]]:
    run: list[Pair] = []
    for pair in pairs:
        if run and not belongs(run, pair):
            yield run
            run = []
        run.append(pair)
    if run:
        yield run


def _place(pair: Pair) -> tuple[int, int]:
    return pair[0].untyped_storage().data_ptr(), int(pair[0].storage_offset())


def _form(pair: Pair) -> tuple[Any, ...]:
    """What pairs that can be stacked have in common."""
    return tuple(
        (str(t.dtype), t.untyped_storage().data_ptr(), tuple(t.shape), tuple(t.stride())) for t in pair
    )


def _steps(last: Pair, pair: Pair) -> tuple[int, int]:
    first, second = (int(b.storage_offset() - a.storage_offset()) for a, b in zip(last, pair, strict=True))
    return first, second


def _goes_on(last: Pair, pair: Pair) -> bool:
    """Whether it begins, on both sides, where the last one ends in the same storage."""
    same = all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in zip(last, pair, strict=True)
    )
    return same and _steps(last, pair) == (last[0].numel(), last[1].numel())


def _is_next(run: Sequence[Pair], pair: Pair) -> bool:
    """Whether it follows as the run's pairs follow each other."""
    if _form(run[-1]) != _form(pair) or min(_steps(run[-1], pair)) <= 0:
        return False
    return len(run) == 1 or _steps(run[-1], pair) == _steps(run[-2], run[-1])


def _stack(first: Tensor, step: int, count: int) -> Tensor:
    return first.as_strided((count, *first.shape), (step, *first.stride()), first.storage_offset())


def _pair(pairs: Pairs, destination: Tensor, source: Tensor) -> None:
    """Both in one shape: dims are split where the other side has more of them, which needs no copy."""
    shape = _common_shape(destination.shape, source.shape)
    assert shape is not None, (destination.shape, source.shape)
    pairs[0].append(destination.view(shape))
    pairs[1].append(source.view(shape))


def _common_shape(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that splits the dims of both, of as many elements; None where they do not divide.

    >>> _common_shape((6, 4), (2, 3, 4))
    (2, 3, 4)
    """
    assert math.prod(one) == math.prod(other)
    sizes = sorted({math.prod(shape[dim:]) for shape in (one, other) for dim in range(len(shape) + 1)} | {1})
    if any(big % small for small, big in itertools.pairwise(sizes)):
        return None
    return tuple(big // small for small, big in itertools.pairwise(sizes))[::-1]
