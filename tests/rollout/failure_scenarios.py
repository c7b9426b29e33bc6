"""What ranks run for the tests of pushes that fail."""

import gc
import json
import os
import resource
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtrl.parallel.errors import LostRanksError, MtrlError, RolloutError
from mtrl.probe import Probe
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.vllm_engine import VllmEngine
from mtrl.weight_push.copies import Copies
from mtrl.weight_push.push import WeightPush
from tests.rollout.push_scenarios import PROMPTS, Case, open_case

CASE = Case(actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:d2")
SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=2, num_samples=1, stop_token_ids=())


def refuses_to_sample(engine: VllmEngine) -> bool:
    try:
        engine.generate(PROMPTS, SAMPLING, seed=0)
    except RolloutError as error:
        return "holds no weights" in str(error)
    return False


@dataclass(slots=True)
class Ways:
    """Ways in which a push can fail, on an engine that holds whole weights."""

    engine: VllmEngine
    push: WeightPush
    probe: Probe

    def with_another_weight(self) -> None:
        norm = self.engine.destinations["model.norm.weight"]
        self.engine.update(lambda: norm.mul_(1.5), policy_version=2)
        try:
            self.probe.run()
        except MtrlError:
            self.engine._policy_version = None  # as the run would end
            raise

    def with_a_bad_copy(self) -> None:
        first = self.push._rounds[0]
        good, bad = first.after, Copies([torch.zeros(2)], [torch.zeros(3)])
        first.after = bad if dist.get_rank() == 1 else good
        try:
            self.push.run(policy_version=2)
        finally:
            first.after = good

    def before_the_pause(self) -> None:
        self._failing_on_rank_1(self.engine._llm.engine_core.engine_core, "pause_scheduler")

    def before_the_first_exchange(self) -> None:
        self._failing_on_rank_1(self.engine._worker, "start_weight_update")

    def _failing_on_rank_1(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def fail(*arguments: Any, **options: Any) -> Any:
            if dist.get_rank() == 1:
                raise ValueError(f"{name} does not want to")
            return real(*arguments, **options)

        setattr(owner, name, fail)
        started = time.monotonic()
        try:
            self.push.run(policy_version=2)
        finally:
            setattr(owner, name, real)
            assert time.monotonic() - started < 10, "ranks waited for each other"

    def with_other_versions(self) -> None:
        self.push.run(policy_version=2 + dist.get_rank())

    def after_a_move(self) -> None:
        owner, name = self.engine.live_parameters()[0]
        data = owner[name].data
        owner[name].data = data.clone() if dist.get_rank() == 0 else data
        self.push._watch._next = 0
        self.push._watch._known.insert(0, (owner, name, data.untyped_storage()))
        try:
            self.push.run(policy_version=2)
        finally:
            owner[name].data = data
            self.push._watch._known.pop(0)

    def with_a_wrong_bit(self) -> None:
        weights = self.engine.destinations.items()
        (down,) = (tensor for name, tensor in weights if "layers.1." in name and "w2_weight" in name)

        def write() -> None:
            self.push._write()
            down.view(torch.int32)[0, 3, 5] ^= int(dist.get_rank() == 1)

        self.engine.update(write, policy_version=2, check=self.push._check)


def failing_pushes(folder: str) -> dict[str, Any]:
    """Per failure: the error, and whether the engine refused to sample after it and sampled after the
    next.
    """
    _, trainer, engine, push = open_case(CASE, Path(folder))
    probe = Probe(
        engine=engine, trainer=trainer, prompts=PROMPTS, num_tokens=16, max_k3_kl=1e-6, temperature=1.0,
        max_tokens=200, pad_token_id=0,
    )  # fmt: skip
    push.run(policy_version=1)
    probe.run()
    ways, found = Ways(engine, push, probe), {}
    for way in (
        ways.with_another_weight, ways.with_a_bad_copy, ways.before_the_pause, ways.before_the_first_exchange,
        ways.with_other_versions, ways.after_a_move, ways.with_a_wrong_bit,
    ):  # fmt: skip
        error = ""
        try:
            way()
        except MtrlError as caught:
            error = f"{type(caught).__name__}: {caught}"
        refused = refuses_to_sample(engine)
        push.run(policy_version=1)
        found[way.__name__] = {"error": error, "refused": refused, "recovers": not refuses_to_sample(engine)}
    engine.shutdown()
    try:
        push.run(policy_version=3)
    except RolloutError as error:
        found["shut down"] = str(error)
    return found


def num_open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def error_of(push: WeightPush, *, policy_version: int = 1) -> str:
    try:
        push.run(policy_version=policy_version)
    except MtrlError as error:
        return str(error)
    return ""


def without_room(folder: str) -> dict[str, Any]:
    """Rank 1 has no room for its engine's weights in memory that others map; then it has."""
    model, _, engine, through_buckets = open_case(replace(CASE, transport="collective"), Path(folder))
    through_buckets.run(policy_version=1)
    expected = engine.generate(PROMPTS, SAMPLING, seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = num_open_files(), {name: each.data_ptr() for name, each in engine.destinations.items()}
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    found: dict[str, Any] = {"must": ""}
    try:
        WeightPush(model, engine, torch.float32, transport="shared_memory")
    except RolloutError as error:
        found["must"] = str(error)
    after = num_open_files(), {name: each.data_ptr() for name, each in engine.destinations.items()}
    found["moved"], found["left open"] = after[1] != before[1], after[0] - before[0]
    without = WeightPush(model, engine, torch.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["remark"] = without.remark
    for name, push in (("without", without), ("with", WeightPush(model, engine, torch.float32))):
        failed = error_of(push)
        same = not failed and engine.generate(PROMPTS, SAMPLING, seed=1) == expected
        found[name] = {"transport": push.transport.name, "failed": failed, "same": same}
    failed = [error_of(without) for _ in range(10)]
    found["an older push"] = next(filter(None, failed), "")
    engine.shutdown()
    del push, without, through_buckets
    found["open at the end"] = num_open_files() - before[0]
    return found


def late_pause(folder: str) -> dict[str, bool]:
    """Whether rank 1's engine, which pauses later than rank 0's, is as it was until then, and other after."""
    model, _, engine, push = open_case(CASE, Path(folder))
    assert isinstance(engine, VllmEngine)
    push.run(policy_version=1)
    was = {name: tensor.clone() for name, tensor in engine.destinations.items()}
    core, found = engine._llm.engine_core.engine_core, {"until the pause": True}
    pause = core.pause_scheduler

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5 * dist.get_rank())
        found["until the pause"] = all(was[name].equal(each) for name, each in engine.destinations.items())
        return pause(*arguments, **options)

    core.pause_scheduler = late
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter.mul_(1.5)
    push.run(policy_version=2)
    found["after"] = all(was[name].equal(each) for name, each in engine.destinations.items())
    engine.shutdown()
    return found


def dying_push(folder: str) -> None:
    """Rank 1 dies before its second exchange; rank 0 leaves what it met in a file."""
    _, _, engine, push = open_case(CASE, Path(folder))
    push.run(policy_version=1)
    if dist.get_rank() == 1:
        push._rounds[1].exchange = partial(os.kill, os.getpid(), signal.SIGKILL)
    try:
        push.run(policy_version=2)
    except LostRanksError as error:
        met = {"error": str(error), "refused": refuses_to_sample(engine)}
        (Path(folder) / "met.json").write_text(json.dumps(met))
    os._exit(0)
