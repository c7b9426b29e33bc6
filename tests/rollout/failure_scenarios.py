"""What ranks run for the tests of pushes that fail."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtrl.parallel.errors import LostRanksError, MtrlError, RolloutError
from mtrl.probe import Probe
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.vllm_engine import VllmEngine
from mtrl.weight_push.copies import Copies
from mtrl.weight_push.transport import Wire
from tests.rollout.push_scenarios import PROMPTS, Case, open_case

CASE = Case(actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:d2")
SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=2, num_samples=1, stop_token_ids=())


def refuses_to_sample(engine: VllmEngine) -> bool:
    try:
        engine.generate(PROMPTS, SAMPLING, seed=0)
    except RolloutError as error:
        return "holds no weights" in str(error)
    return False


def failing_pushes(folder: str) -> dict[str, Any]:
    """Per failure: the error, and whether the engine refused to sample after it and sampled after the
    next.
    """
    _, trainer, engine, push = open_case(CASE, Path(folder))
    rank, found = dist.get_rank(), {}

    def try_out(name: str, action: Callable[[], object]) -> None:
        error = ""
        try:
            action()
        except MtrlError as caught:
            error = f"{type(caught).__name__}: {caught}"
        refused = refuses_to_sample(engine)
        push.run(policy_version=1)
        found[name] = {"error": error, "refused": refused, "recovers": not refuses_to_sample(engine)}

    def with_a_bad_copy() -> None:
        good, bad = push._rounds[0].outgoing, Copies([torch.zeros(2)], [torch.zeros(3)])
        push._rounds[0].outgoing = bad if rank == 1 else good
        try:
            push.run(policy_version=2)
        finally:
            push._rounds[0].outgoing = good

    def after_a_move() -> None:
        owner, name = engine.live_parameters()[0]
        data = owner[name].data
        owner[name].data = data.clone() if rank == 0 else data
        push._spot = 0
        push._storage.insert(0, (owner, name, data.data_ptr()))
        try:
            push.run(policy_version=2)
        finally:
            owner[name].data = data
            push._storage.pop(0)

    def with_a_wrong_bit() -> None:
        def write() -> None:
            push._write()
            if rank == 1:
                (down,) = (t for n, t in engine.destinations.items() if "layers.1." in n and "w2_weight" in n)
                down.view(torch.int32)[0, 3, 5] ^= 1

        engine.update(write, policy_version=2, check=push._check)

    probe = Probe(
        engine=engine, trainer=trainer, prompts=PROMPTS, max_k3_kl=1e-6, temperature=1.0, max_tokens=200,
        pad_token_id=0,
    )  # fmt: skip

    def with_another_weight() -> None:
        engine.update(lambda: engine.destinations["model.norm.weight"].mul_(1.5), policy_version=2)
        try:
            probe.run()
        except MtrlError:
            engine._policy_version = None  # as the run would end
            raise

    push.run(policy_version=1)
    probe.run()
    try_out("another weight", with_another_weight)
    try_out("a copy fails", with_a_bad_copy)
    try_out("versions differ", lambda: push.run(policy_version=2 + rank))
    try_out("a parameter has moved", after_a_move)
    try_out("a wrong bit", with_a_wrong_bit)
    engine.shutdown()
    try:
        push.run(policy_version=3)
    except RolloutError as error:
        found["shut down"] = str(error)
    return found


def dying_push(folder: str) -> None:
    """Rank 1 dies before its second exchange; rank 0 leaves what it met in a file."""
    _, _, engine, push = open_case(CASE, Path(folder))
    push.run(policy_version=1)
    real, number = push.transport.exchange, 0

    def exchange(wire: Wire) -> int:
        nonlocal number
        number += 1
        if number == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(wire)

    push.transport.exchange = exchange  # type: ignore[method-assign]
    try:
        push.run(policy_version=2)
    except LostRanksError as error:
        met = {"error": str(error), "refused": refuses_to_sample(engine)}
        (Path(folder) / "met.json").write_text(json.dumps(met))
    os._exit(0)
