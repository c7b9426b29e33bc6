"""The algebra of weights in examples; its laws are in property/test_boxes_laws.py."""

import doctest

import pytest

from mtrl.models import boxes
from mtrl.models.boxes import Box, Piece, Place, View, parse_pattern

pytestmark = pytest.mark.one_stack


def test_the_examples_in_docstrings_are_true() -> None:
    outcome = doctest.testmod(boxes)
    assert outcome.attempted >= 3 and outcome.failed == 0


def test_a_box_of_no_dims_holds_one_element() -> None:
    box = Box(())
    assert box.num_elements == 1 and box.intersect(box) == box and box.subtract(box) == ()


def test_boxes_of_different_tensors_do_not_compare() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Box(((0, 1), (0, 1))).intersect(Box(((0, 1),)))


def test_a_box_less_its_corner_is_two_boxes() -> None:
    assert Box(((0, 3), (0, 3))).subtract(Box(((0, 1), (0, 1)))) == (
        Box(((1, 3), (0, 3))),
        Box(((0, 1), (1, 3))),
    )


def test_rows_of_one_head_group_are_one_stored_box_and_a_head_of_each_are_several() -> None:
    view = View(name="q", shape=(12, 5), factors=((2, 3, 2), (5,)), order=(0, 1, 2, 3))
    group = Box(((1, 2), (0, 3), (0, 2), (0, 5)))
    assert view.stored_box(group) == Box(((6, 12), (0, 5)))
    head = Box(((0, 2), (1, 2), (0, 2), (0, 5)))
    assert view.stored_box(head) is None
    stored = [view.stored_box(part) for part in view.split_until_stored(head)]
    assert stored == [Box(((2, 4), (0, 5))), Box(((8, 10), (0, 5)))]


def test_a_symbol_absent_from_a_pattern_is_a_dim_of_one() -> None:
    place = Place(name="experts.{expert}.up", pattern="(u j) h")
    view = place.view(("e", "u", "j", "h"), {"e": 8, "u": 1, "j": 3, "h": 5}, expert=6)
    assert view.name == "experts.6.up" and view.shape == (3, 5) and view.view_shape == (1, 1, 3, 5)
    box = place.box(("e", "u", "j", "h"), {"e": (6, 7), "u": (0, 1), "j": (1, 3), "h": (0, 5)})
    assert view.stored_box(box) == Box(((1, 3), (0, 5)))


def test_a_weight_within_a_fused_tensor_is_shifted_to_its_place() -> None:
    place = Place(name="fc1", pattern="(u i) h", within=(("u", 1, 2),))
    symbols, extents = ("u", "i", "h"), {"u": 1, "i": 4, "h": 5}
    view = place.view(symbols, extents)
    assert view.shape == (8, 5)
    box = place.box(symbols, {"u": (0, 1), "i": (0, 4), "h": (0, 5)})
    assert view.stored_box(box) == Box(((4, 8), (0, 5)))


@pytest.mark.parametrize("pattern", ["(a b", "a () b"])
def test_a_malformed_pattern_is_our_own_bug(pattern: str) -> None:
    with pytest.raises(AssertionError, match="group in"):
        parse_pattern(pattern)


def test_a_pattern_of_other_symbols_than_the_roles_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="against"):
        Place(name="w", pattern="v x").view(("v", "h"), {"v": 2, "h": 3, "x": 3})


def test_a_piece_of_two_shapes_is_our_own_bug() -> None:
    view = View(name="w", shape=(4,), factors=((4,),), order=(0,))
    with pytest.raises(AssertionError, match="w -> w"):
        Piece(hf=view, hf_box=Box(((0, 2),)), local=view, local_box=Box(((0, 3),)))
