"""However ranks hold a matrix, what they make of it in FP8 is the whole matrix quantised at once."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtrl.models.backends.torch_native.fp8 import SQUARE, quantise
from mtrl.models.boxes import Box
from mtrl.models.hf_folder import SCALE_SUFFIX
from mtrl.models.transfers import Boxes
from mtrl.weight_push.fp8_images import Fp8Images, PartsPlan
from mtrl.weight_push.nodes import NodePlan, plan_nodes
from mtrl.weight_push.plan import with_scale_boxes
from tests.property.node_bounds import check_plan

NAMES = ("w", "v")


@st.composite
def edges(draw: st.DrawFn, size: int) -> list[int]:
    inner = draw(st.lists(st.integers(1, max(1, size - 1)), max_size=2))
    return sorted({0, size, *(min(each, size) for each in inner)})


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, tuple[int, int]], list[dict[str, tuple[Box, ...]]]]:
    """Shapes, and which boxes each rank holds: every element on at least one."""
    num_ranks = draw(st.integers(1, 4))
    shapes, held = {}, [dict[str, tuple[Box, ...]]() for _ in range(num_ranks)]
    for name in NAMES:
        shapes[name] = (draw(st.integers(1, 300)), draw(st.integers(1, 300)))
        cuts = [list(itertools.pairwise(draw(edges(size)))) for size in shapes[name]]
        for box in itertools.starmap(lambda *ranges: Box(ranges), itertools.product(*cuts)):
            for rank in draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)):
                held[rank][name] = (*held[rank].get(name, ()), box)
    return shapes, held


def numbers(shape: tuple[int, int], kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    if kind == "wild":
        values *= torch.exp2(torch.randint(-40, 40, shape, generator=generator))
    if kind == "zeros":
        values[: shape[0] // 2] = -0.0
    if kind == "not finite":
        values[shape[0] // 2, shape[1] // 3] = torch.nan
        values[0, 0] = torch.inf
    return values


def whole_needs(shapes: dict[str, tuple[int, int]], held: Sequence[Boxes]) -> NodePlan:
    """The plan where the last rank needs everything."""
    every = {name: (Box.full(shape),) for name, shape in shapes.items()}
    needs: list[Any] = [{} for _ in held[1:]] + [every]
    needs[-1] = with_scale_boxes([every], NAMES)[0]
    names = [each for name in NAMES for each in (name, name + SCALE_SUFFIX)]
    return plan_nodes(names, with_scale_boxes(held, NAMES), needs, [0] * len(held))


def made(
    shapes: dict[str, tuple[int, int]],
    held: Sequence[Boxes],
    tensors: dict[str, Tensor],
    scratch_bytes: int,
) -> tuple[NodePlan, PartsPlan, list[Fp8Images]]:
    """Every rank's images, with the exchange between them done here."""
    plan = whole_needs(shapes, held)
    parts = PartsPlan(plan, held, NAMES, [0] * len(held))

    def view(name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        yield box, tensors[name][box.slices]

    ranks = [
        Fp8Images(parts, view, rank=rank, scratch_bytes=scratch_bytes, device=torch.device("cpu"))
        for rank in range(len(held))
    ]
    for _ in range(2):  # the second push: nothing of the first stays
        for each in ranks:
            each.measure()
        for told in parts.largest.first.transfers:
            ((_, there),) = ranks[told.target].wanted(told.name, told.box)
            ((_, here),) = ranks[told.source].held(told.name, told.box)
            there.copy_(here)
        for each in ranks:
            each.quantise()
    return plan, parts, ranks


# No deadline: a busy machine is no counterexample.
@settings(deadline=None, max_examples=60)
@given(layouts(), st.sampled_from(["plain", "wild", "zeros", "not finite"]), st.sampled_from([4, 1 << 22]))
def test_what_is_sent_is_the_whole_matrix_quantised(
    layout: tuple[dict[str, tuple[int, int]], list[Any]], kind: str, scratch_bytes: int
) -> None:
    shapes, held = layout
    tensors = {name: numbers(shape, kind) for name, shape in shapes.items()}
    plan, _, ranks = made(shapes, held, tensors, scratch_bytes)
    for name, tensor in tensors.items():
        stored, scales = quantise(tensor, SQUARE)
        for tensor_name, expected in ((name, stored), (name + SCALE_SUFFIX, scales)):
            bits = torch.uint8 if expected.itemsize == 1 else torch.int32
            for each in plan.first.transfers:
                if each.name == tensor_name:
                    images = ranks[each.source].images[tensor_name]
                    box, image = next((h, i) for h, i in images if h.intersect(each.box) == each.box)
                    sent = image[each.box.relative_to(box).slices].contiguous()
                    assert sent.view(bits).equal(expected[each.box.slices].contiguous().view(bits))


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_ranks_are_told_of_the_blocks_that_they_hold_in_part_and_of_no_others(
    layout: tuple[dict[str, tuple[int, int]], list[Any]],
) -> None:
    shapes, held = layout
    plan = whole_needs(shapes, held)
    parts = PartsPlan(plan, held, NAMES, [0] * len(held))
    senders = {(each.name.removesuffix(SCALE_SUFFIX), each.source) for each in plan.first.transfers}
    have: list[Boxes] = []
    for rank, need in enumerate(parts.need):
        mine = {part.name: part for name in NAMES for part in parts.of_rank(name, rank)}
        have.append({name: (part.blocks,) for name, part in mine.items()})
        for name, boxes in need.items():
            weight = name.rsplit(" part ")[0]
            assert (weight, rank) in senders
            for box in boxes:
                for block in itertools.product(*(range(*each) for each in box.ranges)):
                    whole = [
                        (at * 128, min(at * 128 + 128, size))
                        for at, size in zip(block, shapes[weight], strict=True)
                    ]
                    own = [p.box for p in parts.of_rank(weight, rank) if p.name != name]
                    inside = [each.intersect(Box(tuple(whole))) for each in own]
                    assert any(each is not None and each != Box(tuple(whole)) for each in inside)
    grids = {
        part.name: tuple(-(-size // 128) for size in shapes[part.weight])
        for rank in range(len(held))
        for name in NAMES
        for part in parts.of_rank(name, rank)
    }
    check_plan(parts.largest, grids, have, parts.need, [0] * len(held))
