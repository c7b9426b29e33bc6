"""What ranks run for the tests of engines in processes of their own."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtrl.parallel.errors import MtrlError
from mtrl.rollout.own_process import OwnProcessEngine
from mtrl.weight_push.copies import Copies
from tests.rollout.failure_scenarios import SAMPLING, refuses_to_sample
from tests.rollout.push_scenarios import PROMPTS, Case, open_case

CASE = Case(actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:d2", process="own")


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except MtrlError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failures(folder: str) -> dict[str, Any]:
    """Errors of engines that go on after them, and of one whose process is killed while weights change."""
    _, _, engine, push = open_case(CASE, Path(folder))
    assert isinstance(engine, OwnProcessEngine)
    rank, found = dist.get_rank(), {}
    push.run(policy_version=1)
    first = engine.generate(PROMPTS, SAMPLING, seed=1)
    found["another weight"] = error_of(lambda: engine.plan_weights({"model.nothing.weight": (2, 2)}, {}))
    found["same prompt twice"] = error_of(lambda: engine.generate((PROMPTS[0], PROMPTS[0]), SAMPLING, seed=1))
    entered = push._rounds[0]
    good = entered.after
    if rank == 1:
        entered.after = Copies([torch.zeros(2)], [torch.zeros(3)])
    found["bad copy"] = error_of(lambda: push.run(policy_version=2))
    entered.after = good
    found["refused after it"] = refuses_to_sample(engine)
    found["versions"] = error_of(lambda: push.run(policy_version=2 + rank))
    found["refused after them"] = refuses_to_sample(engine)
    push.run(policy_version=1)
    found["recovers"] = engine.generate(PROMPTS, SAMPLING, seed=1) == first

    def die(*, every: bool) -> None:
        if rank == 1:
            engine._process.send_signal(signal.SIGKILL)

    push._watch.check = die  # type: ignore[method-assign]
    found["killed"] = error_of(lambda: push.run(policy_version=2))
    found["refused after it was killed"] = refuses_to_sample(engine)
    if rank == 0:
        engine.shutdown()
        found["after the end"] = error_of(lambda: engine.generate(PROMPTS, SAMPLING, seed=1))
        found["process"] = engine._process.returncode
    else:
        found["asked again"] = error_of(lambda: engine._ask({"do": "memory"}))
    return found


def dying_trainer(folder: str) -> None:
    """Rank 1 is killed while its engine's process waits for it to write; each leaves that process's id."""
    _, _, engine, push = open_case(CASE, Path(folder))
    assert isinstance(engine, OwnProcessEngine)
    (Path(folder) / f"engine{dist.get_rank()}").write_text(str(engine._process.pid))
    dist.barrier()

    def die(*, every: bool) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    push._watch.check = die  # type: ignore[method-assign]
    push.run(policy_version=1)
