"""In which order training visits the records: shuffled by epoch, exactly resumable."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache


def epoch_order(num_records: int, seed: int, epoch: int) -> list[int]:
    """Return 0..num_records-1 in the shuffled order of this epoch; a function of its arguments alone.

    >>> epoch_order(5, seed=1, epoch=0) == epoch_order(5, seed=1, epoch=0)
    True
    """
    return list(_epoch_order(num_records, seed, epoch))


@lru_cache(maxsize=4)
def _epoch_order(num_records: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Of the random module only random() is promised to stay the same between Python versions, so the
    # order sorts by its draws instead of calling shuffle().
    source = random.Random(f"mtrl.data.order/{seed}/{epoch}")
    draws = [source.random() for _ in range(num_records)]
    return tuple(sorted(range(num_records), key=lambda index: (draws[index], index)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCursor:
    """A position in the endless sequence of epochs: the next record is number ``index`` of ``epoch``.

    All fields are plain integers, so a checkpoint stores ``dataclasses.asdict(cursor)`` as JSON.
    """

    num_records: int
    seed: int
    epoch: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        if self.num_records < 1:
            raise ValueError(f"a cursor needs at least one record, got num_records={self.num_records}")
        if not 0 <= self.index < self.num_records or self.epoch < 0:
            raise ValueError(
                f"epoch {self.epoch}, index {self.index} is no position in {self.num_records} records"
            )

    def take(self, count: int) -> tuple[tuple[int, ...], "DataCursor"]:
        """Return the next ``count`` record numbers and the cursor after them.

        A batch that meets the end of an epoch goes on in the next, so nothing is lost or repeated:
        ``take(a)`` then ``take(b)`` is ``take(a + b)``.
        """
        if count < 0:
            raise ValueError(f"cannot take {count} records")
        taken: list[int] = []
        cursor = self
        while len(taken) < count:
            order = _epoch_order(cursor.num_records, cursor.seed, cursor.epoch)
            part = order[cursor.index : cursor.index + count - len(taken)]
            taken += part
            cursor = cursor._advanced(len(part))
        return tuple(taken), cursor

    def _advanced(self, count: int) -> "DataCursor":
        index = self.index + count
        if index == self.num_records:
            return replace(self, epoch=self.epoch + 1, index=0)
        return replace(self, index=index)
