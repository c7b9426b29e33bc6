"""Copies that follow each other in memory are made as one, and nothing else changes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtrl.models.boxes import Box
from mtrl.weight_push.plan import coalesced, disjoint

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
    new_destinations, new_sources = coalesced((destinations, sources))
    for destination, each in zip(new_destinations, new_sources, strict=True):
        destination.copy_(each)
    assert found.equal(expected)
    assert len(new_destinations) <= len(destinations)


def test_neighbours_on_both_sides_become_one_copy() -> None:
    source, target = torch.arange(12.0), torch.zeros(12)
    order = [2, 0, 1]
    pairs = (
        [target[4 * n : 4 * n + 4].view(2, 2) for n in order],
        [source[4 * n : 4 * n + 4] for n in order],
    )
    destinations, sources = coalesced(pairs)
    assert [each.shape for each in destinations] == [(12,)] == [each.shape for each in sources]
    swapped = ([target[0:4], target[4:8]], [source[4:8], source[0:4]])
    assert len(coalesced(swapped)[0]) == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5))
def test_needed_twice_is_received_once(ranges: list[tuple[int, int]]) -> None:
    boxes = [Box(((start, start + length),)) for start, length in ranges]
    elements = [index for box in disjoint(boxes) for index in range(*box.ranges[0])]
    assert sorted(elements) == sorted({index for box in boxes for index in range(*box.ranges[0])})
