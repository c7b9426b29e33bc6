"""Laws of the algebra of weights, against NumPy's index arrays; and that every rank's pieces fit together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.models.backends.torch_native.places import places
from mtrl.models.boxes import Box, Piece, Place, View, parse_pattern
from mtrl.models.pieces import check_coverage, fill_padding, read_stored, view_of, write_stored
from mtrl.models.stages import Stages
from mtrl.models.transfers import plan_transfers
from mtrl.models.weight_map import WeightMap, padded_vocab_size
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from tests.property import strategies
from tests.toys import empty_tensors, tiny_config

pytestmark = pytest.mark.one_stack


@st.composite
def boxes_in(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    ranges = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        ranges.append((start, draw(st.integers(start + 1, size))))
    return Box(tuple(ranges))


@st.composite
def views(draw: st.DrawFn) -> View:
    """Views of one to three dims of up to three factors each, in any order."""
    factors = tuple(
        tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        for _ in range(draw(st.integers(1, 3)))
    )
    num_factors = sum(len(dim) for dim in factors)
    shape = tuple(int(np.prod(dim)) for dim in factors)
    order = tuple(draw(st.permutations(range(num_factors))))
    return View(name="w", shape=shape, factors=factors, order=order)


def indices(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.arange(int(np.prod(shape))).reshape(shape)


def as_set(array: np.ndarray[Any, Any], box: Box) -> set[int]:
    found = array[box.slices].ravel().tolist()
    assert len(found) == len(set(found)) == box.num_elements
    return set(found)


def indices_of_view(view: View) -> np.ndarray[Any, Any]:
    """For each place of the view, the index of that element in the stored tensor laid out flat."""
    return indices(view.shape).reshape(view.flat_factors).transpose(view.order)


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@given(st.data(), shapes)
def test_intersection_and_difference_part_a_box(data: st.DataObject, shape: list[int]) -> None:
    here, there = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    array = indices(shape)
    common, rest = here.intersect(there), here.subtract(there)
    inside = as_set(array, common) if common else set()
    assert inside == as_set(array, here) & as_set(array, there)
    assert (common is None) == (not inside) and common == there.intersect(here)
    outside = [as_set(array, box) for box in rest]
    assert sum(len(part) for part in outside) == len(set().union(*outside))
    assert set().union(*outside) == as_set(array, here) - as_set(array, there)
    assert len(rest) <= max(1, 2 * len(shape))


@given(st.data(), shapes)
def test_a_box_within_another_is_found_by_its_offset(data: st.DataObject, shape: list[int]) -> None:
    outer = data.draw(boxes_in(shape))
    inner = data.draw(boxes_in(outer.shape))
    moved = Box(
        tuple((a + low, b + low) for (a, b), (low, _) in zip(inner.ranges, outer.ranges, strict=True))
    )
    assert moved.relative_to(outer) == inner
    array = indices(shape)
    assert np.array_equal(array[outer.slices][inner.slices], array[moved.slices])


@given(views())
def test_a_view_is_torchs_own_reshape_and_permutation(view: View) -> None:
    found = view_of(torch.arange(int(np.prod(view.shape))).view(view.shape), view)
    assert tuple(found.shape) == view.view_shape
    assert np.array_equal(found.numpy(), indices_of_view(view))


@given(st.data(), views())
def test_a_stored_box_holds_exactly_the_elements_of_the_views_box(data: st.DataObject, view: View) -> None:
    box = data.draw(boxes_in(view.view_shape))
    wanted = as_set(indices_of_view(view), box)
    stored = view.stored_box(box)
    if stored is not None:
        assert as_set(indices(view.shape), stored) == wanted
    else:
        # There is none: the smallest box around the elements holds others.
        places = np.argwhere(np.isin(indices(view.shape), sorted(wanted)))
        around = Box(
            tuple((int(low), int(high) + 1) for low, high in zip(places.min(0), places.max(0), strict=True))
        )
        assert as_set(indices(view.shape), around) != wanted


@given(st.data(), views())
def test_cutting_until_stored_parts_the_box(data: st.DataObject, view: View) -> None:
    box = data.draw(boxes_in(view.view_shape))
    parts = list(view.split_until_stored(box))
    stored = [view.stored_box(part) for part in parts]
    assert all(each is not None for each in stored)
    elements = [as_set(indices(view.shape), each) for each in stored if each is not None]
    assert sum(len(each) for each in elements) == box.num_elements
    assert set().union(*elements) == as_set(indices_of_view(view), box)
    assert (len(parts) == 1) == (view.stored_box(box) is not None)


@given(st.data(), views())
def test_reading_and_writing_a_piece_are_inverse_and_touch_nothing_else(
    data: st.DataObject, hf: View
) -> None:
    """A local parameter in its own order of dims, of the checkpoint's values one box moved in."""
    hf_box = data.draw(boxes_in(hf.view_shape))
    sizes = tuple(size + data.draw(st.integers(0, 2)) for size in hf_box.shape)
    starts = [data.draw(st.integers(0, size - n)) for size, n in zip(sizes, hf_box.shape, strict=True)]
    local_box = Box(tuple((start, start + n) for start, n in zip(starts, hf_box.shape, strict=True)))
    order = tuple(data.draw(st.permutations(range(len(sizes)))))
    stored_sizes = [0] * len(sizes)
    for dim, factor in enumerate(order):
        stored_sizes[factor] = sizes[dim]
    local = View(name="p", shape=tuple(stored_sizes), factors=tuple((n,) for n in stored_sizes), order=order)
    piece = Piece(hf=hf, hf_box=hf_box, local=local, local_box=local_box)
    checkpoint = torch.arange(1.0, 1.0 + int(np.prod(hf.shape))).view(hf.shape)
    parameter = torch.zeros(local.shape)
    tensors = {(0, "p"): parameter}
    for simple in piece.simple():
        write_stored(tensors, simple, checkpoint[simple.stored.slices])
    expected = torch.zeros(local.shape)
    view_of(expected, local)[local_box.slices] = view_of(checkpoint, hf)[hf_box.slices]
    assert torch.equal(parameter, expected)
    back = torch.zeros(hf.shape)
    for simple in piece.simple():
        back[simple.stored.slices] = read_stored(tensors, simple)
    kept = torch.zeros(hf.shape)
    view_of(kept, hf)[hf_box.slices] = view_of(checkpoint, hf)[hf_box.slices]
    assert torch.equal(back, kept)


symbols = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)


@given(st.data(), symbols)
def test_parsing_a_pattern_inverts_writing_it(data: st.DataObject, names: list[str]) -> None:
    dims: list[tuple[str, ...]] = []
    while names:
        size = data.draw(st.integers(1, len(names)))
        dims.append(tuple(names[:size]))
        names = names[size:]
    brackets = [len(dim) > 1 or data.draw(st.booleans()) for dim in dims]
    blank = data.draw(st.sampled_from(["", " "]))
    text = " ".join(
        f"({blank}{' '.join(dim)}{blank})" if bracket else dim[0]
        for dim, bracket in zip(dims, brackets, strict=True)
    )
    assert parse_pattern(text) == tuple(dims)


def test_interleaved_gate_and_up_rows_come_apart() -> None:
    """gpt-oss: one tensor [expert, hidden, 2 * size], gate and up in turn along the last dim."""
    names, extents = ("e", "u", "j", "h"), {"e": 4, "u": 1, "j": 3, "h": 5}
    fused = torch.arange(4 * 5 * 6.0).view(4, 5, 6)
    locals_ = {(0, "w"): torch.zeros(2, 6, 5)}
    for half in (0, 1):
        hf = Place(name="gate_up", pattern="e h (j u)", within=(("u", half, 2),))
        local = Place(name="w", pattern="e (u j) h", within=(("u", half, 2),))
        ranges = {"e": (1, 3), "u": (0, 1), "j": (0, 3), "h": (0, 5)}
        piece = Piece(
            hf=hf.view(names, extents),
            hf_box=hf.box(names, ranges),
            local=local.view(names, extents | {"e": 2}),
            local_box=local.box(names, ranges | {"e": (0, 2)}),
        )
        for simple in piece.simple():
            write_stored(locals_, simple, fused[simple.stored.slices])
            assert torch.equal(read_stored(locals_, simple), fused[simple.stored.slices])
    gate, up = fused[1:3, :, 0::2].transpose(1, 2), fused[1:3, :, 1::2].transpose(1, 2)
    assert torch.equal(locals_[0, "w"], torch.cat([gate, up], dim=1))


LEGAL = [
    spec
    for spec in strategies.legal_training_specs(8)
    if spec.attn.cp == 1 and not any(8 % size for size in (spec.attn.tp, spec.ffn.ep, spec.ffn.etp))
]


@st.composite
def weight_maps(draw: st.DrawFn) -> WeightMap:
    spec = draw(st.sampled_from(LEGAL))
    num_chunks = draw(st.sampled_from([1, 2])) if spec.attn.pp > 1 else 1
    num_layers = spec.attn.pp * num_chunks + draw(st.integers(0, 2))
    is_moe = spec.ffn.ep > 1 or draw(st.booleans())
    config = tiny_config(
        vocab_size=draw(st.integers(1, 20)),
        num_layers=num_layers,
        tied=draw(st.booleans()),
        dense_layers=draw(st.lists(st.integers(0, num_layers - 1), max_size=2)) if is_moe else None,
    )
    return WeightMap(
        config=config,
        layout=RankLayout.from_spec(spec),
        stages=Stages.balanced(num_layers, spec.attn.pp, num_chunks),
        places=places(config),
    )


# The whole of every rank's weights: few examples cover much.
@settings(max_examples=25)
@given(weight_maps())
def test_the_pieces_of_all_ranks_cover_the_checkpoint_and_each_parameter_once(weight_map: WeightMap) -> None:
    shapes = weight_map.hf_shapes()
    checkpoint, start = {}, 1.0
    for name, shape in shapes.items():
        checkpoint[name] = torch.arange(start, start + int(np.prod(shape))).view(shape)
        start += checkpoint[name].numel()
    back = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for rank in range(weight_map.layout.world_size):
        weights = weight_map.of_rank(rank)
        tensors = empty_tensors(weights)
        check_coverage(tensors, weights)
        fill_padding(tensors, weights)
        for piece in weights.pieces:
            for simple in piece.simple():
                write_stored(tensors, simple, checkpoint[piece.hf.name][simple.stored.slices])
        assert not any(bool(tensor.isnan().any()) for tensor in tensors.values())
        num_padded = sum(int((tensor == 0.0).sum()) for tensor in tensors.values())
        assert num_padded == sum(padding.local_box.num_elements for padding in weights.paddings)
        for piece in weights.pieces:
            for simple in piece.simple():
                back[piece.hf.name][simple.stored.slices] = read_stored(tensors, simple)
    assert all(torch.equal(back[name], checkpoint[name]) for name in shapes)


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8]))
def test_every_token_has_a_row_on_one_tensor_parallel_rank(vocab_size: int, tp: int) -> None:
    config = tiny_config(vocab_size=vocab_size, num_layers=1, tied=False, dense_layers=None)
    layout = RankLayout.from_spec(parse_training_spec(f"megatron:t{tp}"))
    weight_map = WeightMap(config=config, layout=layout, stages=Stages.balanced(1, 1), places=places(config))
    rows: list[int] = []
    for rank in range(tp):
        weights = weight_map.of_rank(rank)
        here = [p for p in weights.pieces if p.hf.name == "model.embed_tokens.weight"]
        rows += [row for piece in here for row in range(*piece.stored.ranges[0])]
        held = {e.local.shape[0] for e in (*here, *weights.paddings) if "embedding" in e.local.name}
        assert held == {padded_vocab_size(vocab_size, tp) // tp}
    assert rows == list(range(vocab_size))


@st.composite
def box_sets(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """Disjoint boxes: each drawn box less those before it."""
    found: list[Box] = []
    for _ in range(draw(st.integers(0, 3))):
        parts = [draw(boxes_in(shape))]
        for other in found:
            parts = [rest for part in parts for rest in part.subtract(other)]
        found += parts
    return tuple(found)


@given(st.data(), st.integers(1, 4))
def test_transfers_deliver_every_needed_element_once_and_no_element_that_is_there(
    data: st.DataObject, num_ranks: int
) -> None:
    shape = (5, 6)
    names = ["a", "b"]
    have = [{name: data.draw(box_sets(shape)) for name in names} for _ in range(num_ranks)]
    # Someone holds everything, as some rank of a model always does.
    have[data.draw(st.integers(0, num_ranks - 1))] = {name: (Box.full(shape),) for name in names}
    need = [{name: data.draw(box_sets(shape)) for name in names} for _ in range(num_ranks)]
    plan = plan_transfers(names, have, need)
    array = indices(shape)

    def elements(boxes: Sequence[Box]) -> set[int]:
        return set().union(*(as_set(array, box) for box in boxes))

    for rank in range(num_ranks):
        lacking = 0
        for name in names:
            arriving = [t for t in plan.transfers if t.target == rank and t.name == name]
            delivered = [element for t in arriving for element in as_set(array, t.box)]
            assert sorted(delivered) == sorted(elements(need[rank][name]))
            for transfer in arriving:
                assert as_set(array, transfer.box) <= elements(have[transfer.source][name])
            lacking += len(elements(need[rank][name]) - elements(have[rank][name]))
        assert plan.num_received(rank) == lacking
