from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtrl.data import DataCursor, epoch_order


@given(num_records=st.integers(0, 200), seed=st.integers(), epoch=st.integers(0, 1000))
def test_an_epoch_visits_every_record_once(num_records: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_records, seed, epoch)) == list(range(num_records))


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_an_order_stays_what_it_was_in_every_python_version() -> None:
    # Written down once: a checkpoint made under one Python version resumes under another.
    assert epoch_order(10, seed=1, epoch=0) == [8, 2, 0, 3, 1, 4, 5, 7, 6, 9]


@given(
    num_records=st.integers(1, 30),
    seed=st.integers(0, 3),
    counts=st.lists(st.integers(0, 40), max_size=8),
)
def test_batches_joined_are_the_epochs_joined(num_records: int, seed: int, counts: list[int]) -> None:
    cursor = DataCursor(num_records=num_records, seed=seed)
    taken: list[int] = []
    for count in counts:
        indices, cursor = cursor.take(count)
        assert len(indices) == count
        taken += indices
    num_epochs = len(taken) // num_records + 1
    endless = [index for epoch in range(num_epochs) for index in epoch_order(num_records, seed, epoch)]
    assert taken == endless[: len(taken)]
    assert (cursor.epoch, cursor.index) == divmod(len(taken), num_records)


def test_a_cursor_from_a_checkpoint_goes_on_where_it_was() -> None:
    _, cursor = DataCursor(num_records=7, seed=3).take(10)
    assert DataCursor(**asdict(cursor)).take(9) == cursor.take(9)


@pytest.mark.parametrize(
    "fields", [{"num_records": 0}, {"num_records": 3, "index": 3}, {"num_records": 3, "epoch": -1}]
)
def test_a_cursor_that_points_nowhere_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="record"):
        DataCursor(seed=0, **fields)
