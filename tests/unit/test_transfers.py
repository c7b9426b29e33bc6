"""Who sends what to whom, in examples; the laws are in property/test_boxes_laws.py."""

import pytest

from mtrl.models.boxes import Box
from mtrl.models.transfers import Transfer, plan_transfers
from mtrl.parallel.errors import WeightError

pytestmark = pytest.mark.one_stack

TOP, BOTTOM = Box(((0, 2), (0, 4))), Box(((2, 4), (0, 4)))
WHOLE = Box(((0, 4), (0, 4)))


def test_a_rank_takes_from_itself_what_it_has() -> None:
    plan = plan_transfers(["w"], [{"w": (TOP,)}, {"w": (BOTTOM,)}], [{"w": (WHOLE,)}, {}])
    assert plan.transfers == (
        Transfer(name="w", box=TOP, source=0, target=0),
        Transfer(name="w", box=BOTTOM, source=1, target=0),
    )
    assert plan.num_received(0) == 8 and plan.num_received(1) == 0


def test_copies_share_the_sending() -> None:
    have = [{"a": (WHOLE,), "b": (WHOLE,)}, {"a": (WHOLE,), "b": (WHOLE,)}, {}]
    plan = plan_transfers(["a", "b"], have, [{}, {}, {"a": (WHOLE,), "b": (WHOLE,)}])
    assert [transfer.source for transfer in plan.transfers] == [0, 1]


def test_a_box_is_put_together_from_boxes_that_lie_across_it() -> None:
    left, right = Box(((0, 4), (0, 2))), Box(((0, 4), (2, 4)))
    plan = plan_transfers(["w"], [{"w": (left,)}, {"w": (right,)}, {}], [{}, {}, {"w": (TOP,)}])
    assert {(transfer.source, transfer.box) for transfer in plan.transfers} == {
        (0, Box(((0, 2), (0, 2)))),
        (1, Box(((0, 2), (2, 4)))),
    }


def test_tensors_travel_in_the_order_asked_for_and_others_stay() -> None:
    have = [{name: (WHOLE,) for name in "abc"}, {}]
    plan = plan_transfers(["c", "a"], have, [{}, {name: (WHOLE,) for name in "abc"}])
    assert [transfer.name for transfer in plan.transfers] == ["c", "a"]


def test_an_element_that_nobody_holds_is_refused_with_its_place() -> None:
    with pytest.raises(WeightError) as raised:
        plan_transfers(["w"], [{"w": (TOP,)}, {}], [{}, {"w": (WHOLE,)}])
    assert str(raised.value) == "no rank holds w[[2, 4], [0, 4]], which rank 1 needs"
