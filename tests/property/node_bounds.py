"""The lower bounds of a push, element by element, and whether a plan meets them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtrl.models.transfers import Boxes, Transfer
from mtrl.weight_push.nodes import NodePlan

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def masks(boxes: Boxes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Mask]:
    found: dict[str, Mask] = {name: np.zeros(shape, np.bool_) for name, shape in shapes.items()}
    for name, held in boxes.items():
        for box in held:
            found[name][box.slices] = True
    return found


def check_plan(
    plan: NodePlan,
    shapes: Mapping[str, tuple[int, ...]],
    have: Sequence[Boxes],
    need: Sequence[Boxes],
    node_of: Sequence[int],
) -> None:
    """Every source has what it sends, everything needed arrives once and nothing else does, and ranks and
    nodes receive need minus have.
    """
    has, wants = [masks(each, shapes) for each in have], [masks(each, shapes) for each in need]
    arrived = [masks({}, shapes) for _ in node_of]
    across = [0] * (max(node_of) + 1)
    received = [0] * len(node_of)
    brought: list[tuple[Transfer, bool]] = [(each, False) for each in plan.first.transfers]
    brought += [(each, True) for each in plan.forwarded.transfers]
    firsts = None
    for each, is_forwarded in brought:
        if is_forwarded and firsts is None:
            firsts = [{name: mask.copy() for name, mask in rank.items()} for rank in arrived]
        source = has[each.source] if not is_forwarded else (firsts or has)[each.source]
        assert source[each.name][each.box.slices].all(), each
        there = arrived[each.target][each.name][each.box.slices]
        assert not there.any(), each
        there[...] = True
        if each.source != each.target:
            received[each.target] += each.box.num_elements
            assert not has[each.target][each.name][each.box.slices].any(), each
        if node_of[each.source] != node_of[each.target]:
            assert not is_forwarded
            across[node_of[each.target]] += each.box.num_elements
    assert received == plan.received(len(node_of))
    for rank, mask in enumerate(arrived):
        assert all(np.array_equal(mask[name], wants[rank][name]) for name in shapes)
        assert received[rank] == sum(int((wants[rank][name] & ~has[rank][name]).sum()) for name in shapes)
    for node, num_elements in enumerate(across):
        ranks = [rank for rank, at in enumerate(node_of) if at == node]
        lacks = 0
        for name in shapes:
            needed = np.logical_or.reduce([wants[rank][name] for rank in ranks])
            lacks += int((needed & ~np.logical_or.reduce([has[rank][name] for rank in ranks])).sum())
        assert num_elements == lacks
