"""Copies that follow each other in memory are made as one, and nothing else changes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtrl.models.boxes import Box
from mtrl.weight_push.copies import Copies, common_shape
from mtrl.weight_push.plan import disjoint
from mtrl.weight_push.turns import ROWS, packed

SIZE = 24


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 6)), max_size=8), st.booleans())
def test_fewer_copies_do_the_same(cuts: list[tuple[int, int]], transposed: bool) -> None:
    source, expected, found = torch.arange(1.0, SIZE + 1), torch.zeros(SIZE), torch.zeros(SIZE)
    destinations, sources, taken = [], [], set()
    for start, length in cuts:
        span = range(start, min(start + length, SIZE))
        if taken.isdisjoint(span):
            taken.update(span)
            destinations.append(found[span.start : span.stop])
            sources.append(source[span.start : span.stop])
            expected[span.start : span.stop] = source[span.start : span.stop]
    if transposed:
        block = torch.zeros(2, 3)
        destinations.append(block.T)
        sources.append(torch.ones(3, 2))
    copies = Copies(destinations, sources).coalesced()
    copies.run()
    assert found.equal(expected)
    assert len(copies) <= len(destinations)


def test_neighbours_on_both_sides_become_one_copy() -> None:
    source, target = torch.arange(12.0), torch.zeros(12)
    order = [2, 0, 1]
    pairs = Copies(
        [target[4 * n : 4 * n + 4].view(2, 2) for n in order],
        [source[4 * n : 4 * n + 4] for n in order],
    )
    found = pairs.coalesced()
    assert [each.shape for each in found.destinations] == [(12,)] == [each.shape for each in found.sources]
    swapped = Copies([target[0:4], target[4:8]], [source[4:8], source[0:4]])
    assert len(swapped.coalesced()) == 2


def test_copies_at_equal_distances_become_one_copy() -> None:
    """As experts' gates go between fused weights, here in another order of blocks too."""
    source, target = torch.arange(96.0), torch.zeros(2, 96)
    expected = Copies()
    for number in range(4):
        expected.add(
            target[0, 20 * number : 20 * number + 12].view(2, 3, 2).transpose(1, 2),
            source[24 * number :][:12],
        )
    found = Copies(
        [each.view(each.shape) for each in expected.destinations], list(expected.sources)
    ).coalesced()
    assert len(found) == 1 and found.destinations[0].shape == (4, 2, 2, 3)
    found.run()
    first = target.clone()
    target.zero_()
    expected.run()
    assert target.equal(first)


@given(st.lists(st.sampled_from([2, 3, 4, 5]), max_size=4), st.data())
def test_a_common_shape_splits_both(sizes: list[int], data: st.DataObject) -> None:
    def joined() -> list[int]:
        shape = list(sizes)
        while len(shape) > 1 and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(shape) - 2))
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
        return shape

    one, other = joined(), joined()
    shape = common_shape(one, other)
    assert shape is not None and math.prod(shape) == math.prod(sizes)
    tensor = torch.arange(math.prod(sizes))
    assert tensor.view(one).view(shape).equal(tensor.view(other).view(shape))
    assert common_shape((4, 6), (3, 8)) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5))
def test_needed_twice_is_received_once(ranges: list[tuple[int, int]]) -> None:
    boxes = [Box(((start, start + length),)) for start, length in ranges]
    elements = [index for box in disjoint(boxes) for index in range(*box.ranges[0])]
    assert sorted(elements) == sorted({index for box in boxes for index in range(*box.ranges[0])})


def pack(source: torch.Tensor, target: torch.Tensor) -> None:
    """What vLLM's kernel does; tests/rollout has the kernel itself."""
    *_, num_rows, width = source.shape
    blocks = source.view(num_rows // ROWS, ROWS, width).transpose(1, 2)
    target.view(num_rows // ROWS, width, ROWS).copy_(blocks)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.booleans(), st.booleans())
def test_packing_by_a_kernel_writes_what_copies_write(
    num_stacks: int, num_blocks: int, width: int, is_whole: bool, is_plain: bool
) -> None:
    shape = (num_stacks, num_blocks, ROWS, width)
    source = torch.arange(float(math.prod(shape))).view(shape)
    if not is_whole:
        source = source[:, :, :, : max(1, width // 2)]
    targets = [torch.zeros(source.shape if is_plain else source.mT.shape) for _ in range(2)]
    views = targets if is_plain else [target.mT for target in targets]
    expected, found = (Copies([view], [source]).coalesced() for view in views)
    found = packed(found, pack, is_faster=lambda *_: True)
    is_turn = not is_plain and source.is_contiguous() and source.shape[-1] > 1
    assert len(found.by_kernel) == int(is_turn and num_stacks * num_blocks % 2 == 0)
    expected.run(), found.run()
    assert targets[0].equal(targets[1])
