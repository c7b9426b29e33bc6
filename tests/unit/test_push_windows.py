"""Writing to an engine that keeps elements twice: each arrives once, and the engine copies it itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtrl.models.boxes import Box
from mtrl.parallel.errors import WeightError
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.loader_record import LoaderRecord, RecordedCopy, Region
from mtrl.rollout.places import Places
from mtrl.weight_push.plan import Needs
from mtrl.weight_push.views import EngineViews, matched
from mtrl.weight_push.windows import doubled

NAME, SHAPE = "weight", (6, 4)


def region(rows: int, columns: int, width: int, offset: int = 0) -> Region:
    return Region(shape=(rows, columns), stride=(width, 1), offset=offset)


def copy(source: Region, destination: str, to: Region) -> RecordedCopy:
    return RecordedCopy(source=NAME, source_region=source, destination=destination, destination_region=to)


def engine() -> tuple[EngineViews, dict[str, torch.Tensor]]:
    """One that keeps rows 0 to 4 in one tensor, 3 to 6 in another, and rows 1 and 2 in a third as well."""
    live = {"low": torch.zeros(4, 4), "high": torch.zeros(3, 4), "again": torch.zeros(5, 4)}
    record = LoaderRecord(
        sources={NAME: SHAPE},
        copies=(
            copy(region(4, 4, 4), "low", region(4, 4, 4)),
            copy(region(3, 4, 4, 12), "high", region(3, 4, 4)),
            copy(region(2, 4, 4, 4), "again", region(2, 4, 4, 8)),
        ),
        fills=(),
    )
    record = LoaderRecord.from_json(record.to_json())
    return EngineViews(needs=Needs.of(record), placed=Places(live, {}).placed, staging={}), live


def test_each_element_is_delivered_once_and_then_everywhere() -> None:
    views, live = engine()
    weight = torch.arange(24.0).view(SHAPE) + 1
    delivered = 0
    for box in views.needs.boxes[NAME]:
        pairs = list(matched(lambda _, part: iter([(part, weight[part.slices])]), views.delivered, NAME, box))
        for target, source in pairs:
            target.copy_(source)
            delivered += target.numel()
    assert delivered == weight.numel()
    assert not live["again"].any()  # low has these rows, and comes first
    for box in views.needs.boxes[NAME]:
        for target, source in doubled(views, NAME, box):
            target.copy_(source)
    assert live["low"].equal(weight[:4]) and live["high"].equal(weight[3:])
    assert live["again"][2:4].equal(weight[1:3]) and not live["again"][[0, 1, 4]].any()


def test_an_engine_that_keeps_each_element_once_copies_nothing_itself() -> None:
    views, _ = engine()
    assert list(doubled(views, NAME, Box(((0, 1), (0, 4))))) == []
    assert list(doubled(views, NAME, Box(((4, 6), (0, 4))))) == []
    assert len(list(doubled(views, NAME, Box(((1, 3), (0, 4)))))) == 1


def test_a_staged_weight_without_a_place_is_refused() -> None:
    engine: Any = SimpleNamespace(_places=Places({}, {}))
    with pytest.raises(WeightError, match="no place for weight any more; make a new WeightPush"):
        InPlaceEngine.replay(engine, {NAME: torch.zeros(SHAPE)})
