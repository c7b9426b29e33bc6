"""Flat ranges of parameters, and who writes which box: every element once."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtrl.checkpoint.optimizer_state import box_name, parse_box_name, written_boxes
from mtrl.models.boxes import Box, Piece, Place
from mtrl.models.flat_ranges import boxes_of_range, pieces_of_range
from mtrl.models.pieces import range_region

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def shape_and_range(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(shape_and_range())
def test_a_range_is_few_boxes_that_hold_its_elements_in_order(
    given_range: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = given_range
    elements = torch.arange(math.prod(shape)).view(shape)
    boxes = list(boxes_of_range(shape, start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    found = [value for box in boxes for value in elements[box.slices].flatten().tolist()]
    assert found == list(range(start, stop))


@given(st.data())
def test_a_range_of_a_fused_parameter_is_its_share_of_every_checkpoint_tensor(data: st.DataObject) -> None:
    """Queries, keys and values lie per group in one parameter, and in three tensors of the checkpoint."""
    groups, heads, size, hidden = 2, data.draw(st.integers(1, 3)), 2, data.draw(st.integers(1, 4))
    extents = {"g": groups, "r": heads, "k": 1, "d": size, "h": hidden}
    local_extents = extents
    pieces, tensors = [], {}
    parameter = torch.zeros(groups * (heads + 2) * size, hidden, dtype=torch.int64)
    for number, (name, symbol, count, offset) in enumerate(
        (("q", "r", heads, 0), ("k", "k", 1, heads), ("v", "k", 1, heads + 1))
    ):
        symbols = ("g", symbol, "d", "h")
        hf = Place(name=name, pattern=f"(g {symbol} d) h")
        local = Place(name="qkv", pattern=f"(g {symbol} d) h", within=((symbol, offset, heads + 2),))
        ranges = {each: (0, extents[each]) for each in symbols}
        piece = Piece(
            hf=hf.view(symbols, extents),
            hf_box=hf.box(symbols, ranges),
            local=local.view(symbols, local_extents),
            local_box=local.box(symbols, ranges),
        )
        pieces.append(piece)
        rows = groups * count * size
        tensors[name] = 1000 * (number + 1) + torch.arange(rows * hidden).view(rows, hidden)
        view = parameter.view(piece.local.flat_factors).permute(piece.local.order)
        view[piece.local_box.slices] = tensors[name].view(piece.hf.flat_factors).permute(piece.hf.order)
    start = data.draw(st.integers(0, parameter.numel()))
    stop = data.draw(st.integers(start, parameter.numel()))
    shard = parameter.flatten()[start:stop].clone()
    seen = []
    for part in pieces_of_range(pieces, start, stop):
        stored = part.piece.stored
        region = range_region(shard, part).reshape(stored.shape)
        assert region.equal(tensors[part.piece.hf.name][stored.slices])
        seen += region.flatten().tolist()
    assert sorted(seen) == sorted(shard.tolist())


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=3), min_size=1, max_size=4)
)
def test_every_element_is_written_once_whoever_holds_it(held: list[list[tuple[int, int]]]) -> None:
    """Boxes of ranks may be the same, overlap, or nest: tied weights lie in shards of two stages."""
    rows = [[((a, max(b, a + 1)),) for a, b in rank] for rank in held]
    rows[0].append(((0, 8),))  # somebody has all
    everyones = [{"w": [list(box) for box in dict.fromkeys(rank)]} for rank in rows]
    writes = written_boxes(everyones, {"w": (8,)})
    elements = [index for rank in writes for _, box in rank for index in range(*box.ranges[0])]
    assert sorted(elements) == list(range(8))
    for rank, boxes in enumerate(writes):
        for _, box in boxes:
            assert any(Box(row).intersect(box) == box for row in rows[rank])


@given(st.sampled_from(["master", "exp_avg"]), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_the_name_of_a_box_says_all_of_it(kind: str, ranges: list[tuple[int, int]]) -> None:
    box = Box(tuple(ranges))
    assert parse_box_name(box_name(kind, "model.layers.0.x", box)) == (kind, "model.layers.0.x", box)


def test_replicas_share_the_writing() -> None:
    boxes = [[[4 * row, 4 * row + 4]] for row in range(4)]
    everyones = [{"w": boxes}, {"w": boxes}]
    loads = [sum(box.num_elements for _, box in rank) for rank in written_boxes(everyones, {"w": (16,)})]
    assert loads == [8, 8]
