"""Kills and failing disks at chosen points of a run: around the real system calls, by the real SIGKILL.

Points are counted in each process: every write, fsync and rename that mtrl makes, the model's forward pass,
Adam's update, a round of the push. A run without a fault counts them; one with a fault stops at a number.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYSTEM_CALLS = ("write", "fsync", "rename", "replace")


@dataclass(slots=True, kw_only=True)
class Faults:
    """What happens at which point of this process.

    ``action`` is ``kill`` (before the call), ``half`` (a write is cut in two and the process killed between),
    ``kill all`` (every rank, before the call), or the name of an errno: the call fails with it, and all
    writes from then on.
    """

    number: int = -1
    action: str = "count"
    pids: Path | None = None
    points: list[str] = field(default_factory=list)

    def meet(self, what: str) -> bool:
        """Count a point; kill here if it is the one. True if the call is to fail or to be cut."""
        here = len(self.points)
        self.points.append(what)
        if self.number < 0 or here < self.number:
            return False
        if self.action.startswith("E"):
            return what.startswith("write") or here == self.number
        if here != self.number:
            return False
        if self.action == "half" and what.startswith("write"):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """SIGKILL this process, after the others if all are to go."""
        if self.action == "kill all" and self.pids is not None:
            for path in self.pids.iterdir():
                if path.name != str(os.getpid()):
                    os.kill(int(path.name), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap the system calls of mtrl, the forward pass, Adam and the push."""
        if self.pids is not None:
            self.pids.mkdir(parents=True, exist_ok=True)
            (self.pids / str(os.getpid())).touch()
        for name in SYSTEM_CALLS:
            setattr(os, name, self._wrap_call(name, getattr(os, name)))
        self._wrap_python()

    def _wrap_call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not str(sys._getframe(1).f_globals.get("__name__")).startswith("mtrl."):
                return real(*arguments, **options)
            if self.meet(f"{name} {_subject(arguments)}"):
                if self.action == "half":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    self.kill()
                number = getattr(errno, self.action)
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    def _wrap_python(self) -> None:
        import torch

        from mtrl.models.gather import TensorGather
        from mtrl.weight_push.push import WeightPush

        from megatron.core.models.gpt import GPTModel

        for owner, name, what in (
            (GPTModel, "forward", "forward pass"),
            (torch.optim.AdamW, "step", "optimizer step"),
            (TensorGather, "_run_round", "exchange of weights"),
            (WeightPush, "_exchange", "round of the push"),
        ):
            setattr(owner, name, self._around(getattr(owner, name), what))

    def _around(self, real: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.meet(f"before {what}")
            result = real(*arguments, **options)
            self.meet(f"after {what}")
            return result

        return call


def _subject(arguments: tuple[Any, ...]) -> str:
    """The last two parts of the path that a call is about, without the process id of temporary names."""
    first = arguments[0]
    path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
    return re.sub(r"\.\d+\.tmp$", ".tmp", "/".join(Path(path).parts[-2:]))


def run_with(
    folder: str, arguments: list[str], rank: int, number: int, action: str, pids: str
) -> dict[str, Any]:
    """On a rank of a world: ``mtrl/train.py ARGUMENTS``, with a fault on ``rank`` alone; the points met."""
    from mtrl.train import main

    os.chdir(folder)
    sys.path.insert(0, folder)
    own = int(os.environ["RANK"])
    faults = Faults(number=number if own == rank else -1, action=action, pids=Path(pids))
    faults.install()
    status = main(arguments)
    return {"status": status, "points": faults.points}
