"""Asked to stop: SIGTERM and Ctrl-C end a run after the step in progress, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mtrl.exchange import max_over_ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop and has saved; raised on all ranks."""


class StopRequest:
    """Whether a signal asked this process to stop. A second signal ends it at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def is_agreed(self) -> bool:
        """Whether any rank was asked. Collective over WORLD."""
        return max_over_ranks(float(self.is_asked)) > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests inside the block."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        signal.signal(number, signal.SIG_DFL)
