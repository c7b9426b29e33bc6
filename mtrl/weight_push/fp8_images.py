"""What a trainer's rank sends in place of weights that the engine keeps in FP8: its share, quantised there.

A block's scale follows from the largest magnitude of all its numbers. Where a rank holds a block only in part
(a tensor parallel slice that is no multiple of 128), ranks first tell each other the largest of their parts,
4 bytes for each, planned and sent like weights; each then quantises its own part. So an element travels as
one byte whatever the layout, and the engine's bytes are those of quantising the whole tensor at once.

Work is in batches of equal shapes: each is a *canvas*, float32 [N, rows, columns], of whole blocks, zero
where the rank holds nothing.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mtrl.models.backends.torch_native.fp8 import E4M3, SQUARE, block_scales
from mtrl.models.boxes import Box
from mtrl.models.hf_folder import SCALE_SUFFIX, Blocks
from mtrl.models.transfers import Boxes
from mtrl.rollout.fp8_weights import block_box
from mtrl.weight_push.copies import Copies
from mtrl.weight_push.nodes import NodePlan, plan_nodes
from mtrl.weight_push.plan import disjoint

Held = Callable[[str, Box], Iterator[tuple[Box, Tensor]]]
_SINGLE = Blocks(rows=1, columns=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box that some ranks hold of a weight, the ``number``-th of its boxes."""

    weight: str
    number: int
    box: Box

    @property
    def name(self) -> str:
        """What its blocks' largest magnitudes are called in plans."""
        return f"{self.weight} part {self.number}"

    @property
    def blocks(self) -> Box:
        """The blocks that it touches."""
        return block_box(self.box)


class PartsPlan:
    """Which ranks quantise which parts, and what they must be told for it. Pure; the same on all ranks.

    ``plan`` is that of the push. ``largest`` delivers the largest magnitudes of blocks that parts share.
    """

    def __init__(
        self, plan: NodePlan, held: Sequence[Boxes], names: Collection[str], node_of: Sequence[int]
    ) -> None:
        self._held = held
        self._parts = {name: _parts(name, held) for name in names}
        cut = [name for name in names if _share_blocks(self._parts[name])]
        senders = {(each.name.removesuffix(SCALE_SUFFIX), each.source) for each in plan.first.transfers}
        need: list[dict[str, tuple[Box, ...]]] = [{} for _ in held]
        have: list[dict[str, tuple[Box, ...]]] = [{} for _ in held]
        for name, rank in itertools.product(cut, range(len(held))):
            have[rank] |= {part.name: (part.blocks,) for part in self.of_rank(name, rank)}
            if (name, rank) in senders:
                need[rank] |= self._lacking(name, rank)
        self.need: Sequence[Boxes] = need
        wanted = list(dict.fromkeys(itertools.chain.from_iterable(need)))
        self.largest = plan_nodes(wanted, have, need, node_of)
        weight_of = {part.name: name for name in cut for part in self._parts[name]}
        told = {(weight_of[each.name], each.source) for each in self.largest.first.transfers}
        self._workers = senders | told

    def of_rank(self, name: str, rank: int) -> list[Part]:
        """The parts of a weight that a rank holds."""
        held = self._held[rank].get(name, ())
        return [part for part in self._parts[name] if part.box in held]

    def work(self, rank: int) -> list[Part]:
        """What a rank measures and quantises."""
        return [
            part for name in self._parts if (name, rank) in self._workers for part in self.of_rank(name, rank)
        ]

    def _lacking(self, name: str, rank: int) -> dict[str, tuple[Box, ...]]:
        """By other parts: the blocks that they share with this rank's."""
        found: dict[str, list[Box]] = {}
        for own in self.of_rank(name, rank):
            for other in self._parts[name]:
                common = own.blocks.intersect(other.blocks)
                if other != own and common is not None:
                    found.setdefault(other.name, []).append(common)
        return {each: tuple(disjoint(boxes)) for each, boxes in found.items()}


def _parts(name: str, held: Sequence[Boxes]) -> list[Part]:
    boxes = sorted({box for rank in held for box in rank.get(name, ())}, key=lambda box: box.ranges)
    return [Part(weight=name, number=number, box=box) for number, box in enumerate(boxes)]


def _share_blocks(parts: Sequence[Part]) -> bool:
    return any(one.blocks.intersect(other.blocks) for one, other in itertools.combinations(parts, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Parts that touch as many blocks: ``start`` counts blocks of all batches before it."""

    parts: tuple[Part, ...]
    start: int
    fill: Copies
    is_whole: bool
    canvas: Tensor
    stored: Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        """Parts, and the rows and columns of blocks of each."""
        rows, columns = self.parts[0].blocks.shape
        return len(self.parts), rows, columns

    def of(self, flat: Tensor) -> Tensor:
        """Its share of a number for each block, [N, rows, columns]."""
        return flat[self.start : self.start + prod(self.grid)].view(self.grid)

    def blocked(self, canvas: Tensor) -> Tensor:
        """A canvas as [N, rows of blocks, 128, columns of blocks, 128]."""
        number, rows, columns = self.grid
        return canvas.view(number, rows, SQUARE.rows, columns, SQUARE.columns)


class Fp8Images:
    """This rank's share of weights, quantised anew in each push.

    ``images`` has, of each weight and of its scales, boxes with their live tensors. ``scratch_bytes`` bounds
    a canvas, unless one part is larger; ``held`` gives views of the trainer's tensors.
    """

    def __init__(
        self, plan: PartsPlan, held: Held, *, rank: int, scratch_bytes: int, device: torch.device
    ) -> None:
        work, need = plan.work(rank), plan.need[rank]
        limit = scratch_bytes // 4
        batches = list(_batches(work, limit))
        largest_canvas = max((_canvas_size(each) for each in batches), default=0)
        self._scratch = torch.empty(largest_canvas, dtype=torch.float32, device=device)
        self._batches: list[_Batch] = []
        start = 0
        for parts in batches:
            self._batches.append(self._batch(parts, start, held))
            start += prod(self._batches[-1].grid)
        self._largest = torch.empty(start, dtype=torch.float32, device=device)
        self._scales = torch.empty(start, dtype=torch.float32, device=device)
        sizes = [box.num_elements for boxes in need.values() for box in boxes]
        self._told = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self._slots = _slots(need, self._told)
        self._measured: dict[str, tuple[Box, Tensor]] = {}
        self.images: dict[str, list[tuple[Box, Tensor]]] = {}
        for batch in self._batches:
            self._name_images(batch)
        self._index = self._shared_blocks(need)
        self._is_told_first = bool(plan.largest.first.transfers)

    @property
    def num_bytes(self) -> int:
        """Memory of everything that is kept."""
        kept = (
            self._scratch,
            self._largest,
            self._scales,
            self._told,
            *(each.stored for each in self._batches),
        )
        return sum(each.nbytes for each in kept)

    def measure(self) -> None:
        """Find the largest magnitude of each block, as far as this rank holds it."""
        for batch in self._batches if self._is_told_first else ():
            self._fill(batch)
            self._measure(batch)

    def quantise(self) -> None:
        """Given what other ranks measured, make the images anew."""
        to, of = self._index
        if to.numel():
            self._largest.scatter_reduce_(0, to, self._told[of], "amax")
        for batch in self._batches:
            self._fill(batch)
            if not self._is_told_first:
                self._measure(batch)
            scales = block_scales(batch.of(self._largest).reshape(-1, 1), _SINGLE).view(batch.grid)
            batch.of(self._scales).copy_(scales)
            canvas = batch.blocked(batch.canvas)
            canvas.div_(scales[:, :, None, :, None]).clamp_(-E4M3.largest, E4M3.largest)
            batch.stored.copy_(batch.canvas)

    def held(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """What this rank has measured, as `Views.held`; ``name`` is a part's."""
        blocks, measured = self._measured[name]
        yield box, measured[box.relative_to(blocks).slices]

    def wanted(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Where this rank wants to be told what others have measured, as `Views.wanted`."""
        slot, told = next((slot, told) for slot, told in self._slots[name] if slot.intersect(box) == box)
        yield box, told[box.relative_to(slot).slices]

    delivered = wanted

    def _batch(self, parts: tuple[Part, ...], start: int, held: Held) -> _Batch:
        rows, columns = (n * size for n, size in zip(parts[0].blocks.shape, _SIZES, strict=True))
        canvas = self._scratch[: len(parts) * rows * columns].view(len(parts), rows, columns)
        fill = Copies()
        for number, part in enumerate(parts):
            own = canvas[number][_within(part.box, part.blocks).slices]
            for box, view in held(part.weight, part.box):
                fill.add(own[box.relative_to(part.box).slices], view)
        return _Batch(
            parts=parts, start=start, fill=fill.coalesced(), canvas=canvas,
            is_whole=all(part.box.num_elements == rows * columns for part in parts),
            stored=torch.empty(canvas.shape, dtype=E4M3.dtype, device=canvas.device),
        )  # fmt: skip

    def _name_images(self, batch: _Batch) -> None:
        for number, part in enumerate(batch.parts):
            stored = batch.stored[number][_within(part.box, part.blocks).slices]
            self.images.setdefault(part.weight, []).append((part.box, stored))
            scales = batch.of(self._scales)[number]
            self.images.setdefault(part.weight + SCALE_SUFFIX, []).append((part.blocks, scales))
            self._measured[part.name] = part.blocks, batch.of(self._largest)[number]

    def _shared_blocks(self, need: Boxes) -> tuple[Tensor, Tensor]:
        """For every block of this rank that another part shares: where its magnitude lies, and where the
        other's.
        """
        own = torch.arange(self._largest.numel(), device=self._largest.device)
        told: dict[str, list[tuple[str, Box, Tensor]]] = {}
        for name, slots in _slots(need, torch.arange(self._told.numel(), device=own.device)).items():
            weight = name.rsplit(" part ", 1)[0]
            told.setdefault(weight, []).extend((name, slot, index) for slot, index in slots)
        to, of = [own[:0]], [own[:0]]
        for batch in self._batches:
            for part, here in zip(batch.parts, batch.of(own), strict=True):
                for name, slot, there in told.get(part.weight, ()):
                    common = slot.intersect(part.blocks)
                    if common is not None and name != part.name:
                        to.append(here[common.relative_to(part.blocks).slices].reshape(-1))
                        of.append(there[common.relative_to(slot).slices].reshape(-1))
        return torch.cat(to), torch.cat(of)

    def _fill(self, batch: _Batch) -> None:
        if not batch.is_whole:
            batch.canvas.zero_()  # other batches have used it
        batch.fill.run()

    def _measure(self, batch: _Batch) -> None:
        batch.of(self._largest).copy_(batch.blocked(batch.canvas).abs().amax((2, 4)))


_SIZES = (SQUARE.rows, SQUARE.columns)


def _within(box: Box, blocks: Box) -> Box:
    """A box counted from the corner of the first block that it touches."""
    corner = [low * size for (low, _), size in zip(blocks.ranges, _SIZES, strict=True)]
    return Box(tuple((low - at, high - at) for (low, high), at in zip(box.ranges, corner, strict=True)))


def _batches(parts: Sequence[Part], limit: int) -> Iterator[tuple[Part, ...]]:
    """Parts whose blocks have one shape, as many as ``limit`` numbers hold, and at least one."""
    by_shape: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        by_shape.setdefault(part.blocks.shape, []).append(part)
    for alike in by_shape.values():
        at_once = max(1, limit // _canvas_size(alike[:1]))
        for first in range(0, len(alike), at_once):
            yield tuple(alike[first : first + at_once])


def _canvas_size(parts: Sequence[Part]) -> int:
    return len(parts) * prod(parts[0].blocks.shape) * prod(_SIZES)


def _slots(need: Boxes, flat: Tensor) -> Mapping[str, list[tuple[Box, Tensor]]]:
    """Each box of ``need`` with its share of ``flat``, in order."""
    found: dict[str, list[tuple[Box, Tensor]]] = {}
    start = 0
    for name, boxes in need.items():
        for box in boxes:
            view = flat[start : start + box.num_elements].view(box.shape)
            found.setdefault(name, []).append((box, view))
            start += box.num_elements
    return found
