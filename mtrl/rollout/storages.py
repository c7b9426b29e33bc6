"""Live tensors that must stay where they were when something was planned on them."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from mtrl.parallel.errors import WeightError

NUM_AT_ONCE = 16


class StorageWatch:
    """Notices when a tensor's storage was replaced; ``live`` are mappings, each with a key in it.

    Storages are compared, not addresses: what is offloaded and onloaded (memory.py) may lie elsewhere.
    """

    def __init__(self, live: Iterable[tuple[Mapping[str, Tensor], str]]) -> None:
        self._known = [(owner, name, owner[name].untyped_storage()) for owner, name in live]
        self._next = 0

    def check(self, *, every: bool = False) -> None:
        """Look at ``every`` one of them, or at some, others each time, so that the cost does not grow with
        their number.

        Raises:
            WeightError: one was replaced.
        """
        some = self._known if every else self._known[self._next : self._next + NUM_AT_ONCE]
        self._next = self._next + NUM_AT_ONCE if len(some) == NUM_AT_ONCE else 0
        moved = [name for owner, name, was in some if owner[name].untyped_storage()._cdata != was._cdata]
        if moved:
            raise WeightError(
                f"{moved[0]} is not where it was when the push was planned, in trainer or engine; make a new "
                "WeightPush after weights were replaced"
            )
