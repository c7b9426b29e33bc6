"""Asked to stop: SIGTERM and Ctrl-C end a run after the step in progress, with a checkpoint."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mtrl.exchange import max_over_ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

REPEAT_S = 5.0
"""Signals within this time of the first are the same request: a scheduler tells every process, then torchrun
passes on what it got itself."""


class Stopped(Exception):
    """The run was asked to stop and has saved; raised on all ranks."""


class StopRequest:
    """Whether a signal asked this process to stop. Another, later, ends it at once."""

    def __init__(self) -> None:
        self.is_asked = False
        self._asked_at = 0.0

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
        if not self.is_asked:
            self.is_asked, self._asked_at = True, time.monotonic()
        elif time.monotonic() - self._asked_at > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
