"""An engine in a process of its own on each rank's machine, whose live weights this process maps.

vLLM then changes nothing in the trainer's process, and a push writes to the engine's memory as it does to
that of an engine here: same plan, same bytes. What is asked of it goes through a socket that only the two
processes have.
"""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.batch import Completion, Prompt
from mtrl.exchange import decode
from mtrl.parallel import errors
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.errors import MtrlError, RolloutError
from mtrl.parallel.spec import RolloutSpec
from mtrl.rollout import vllm_build
from mtrl.rollout.channel import Channel, Message
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.kernel_layout import KernelLayout
from mtrl.rollout.loader_record import LoaderRecord
from mtrl.rollout.places import Places
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.shared_weights import Shared, map_weights
from mtrl.rollout.vllm_engine import Dtype

_END_S = 30.0
"""How long an engine may take to shut down before its process is killed."""


class OwnProcessEngine(InPlaceEngine):
    """A `RolloutEngine` in another process; build it with `create`."""

    def __init__(
        self, *, process: "subprocess.Popen[bytes]", channel: Channel, spec: RolloutSpec, places: Places,
        has_fp8_weights: bool, shared: Shared, descriptors: list[int],
    ) -> None:  # fmt: skip
        super().__init__(spec=spec, places=places, has_fp8_weights=has_fp8_weights)
        self._process, self._channel = process, channel
        self._is_shut_down = False
        self._record: LoaderRecord | None = None
        self._shared = shared, descriptors

    @classmethod
    def create(
        cls,
        model_dir: Path,
        spec: RolloutSpec,
        *,
        max_model_len: int,
        max_num_seqs: int,
        dtype: Dtype,
        seed: int,
        kv_cache_bytes: int,
        expert_parallel: bool = False,
        moe_backend: vllm_build.MoeBackend = "triton",
    ) -> "OwnProcessEngine":
        """Start this rank's process and build its share of the engine in it. Collective over WORLD.

        Arguments and errors are those of `VllmEngine.create`.
        """
        vllm_build.check_spec(model_dir, spec)
        (name,) = {*gather_json(f"mtrl-engine-{secrets.token_hex(8)}")[:1]}
        process, channel = _start()
        order: Message = {
            "do": "create", "name": name, "rank": dist.get_rank(), "world_size": dist.get_world_size(),
            "address": os.environ.get("MASTER_ADDR"), "port": int(os.environ.get("MASTER_PORT", "0")),
            "num_threads": torch.get_num_threads(),
            "arguments": {
                "model_dir": str(model_dir), "spec": str(spec), "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs, "dtype": dtype, "seed": seed, "kv_cache_bytes": kv_cache_bytes,
                "expert_parallel": expert_parallel, "moe_backend": moe_backend,
            },
        }  # fmt: skip
        shared, _ = _asked(process, channel, order)
        descriptors = channel.receive_descriptors(shared["num_descriptors"])
        weights = map_weights(shared["weights"], descriptors)
        rest, _ = _answer(process, channel)
        layouts = {name: KernelLayout(**layout) for name, layout in rest["layouts"].items()}
        places = Places(weights, layouts)
        is_fp8 = dtype == "fp8"
        return cls(
            process=process, channel=channel, spec=spec, places=places, has_fp8_weights=is_fp8,
            shared=shared["weights"], descriptors=descriptors,
        )  # fmt: skip

    def plan_weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> LoaderRecord:
        """See `InPlaceEngine.plan_weights`."""
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        answer, _ = self._ask({"do": "plan", "shapes": dict(shapes), "dtypes": names})
        record = LoaderRecord.from_json(answer["record"])
        self._places.forget()
        self._places.remember(record.copies)
        self._record = record
        return record

    @property
    def loader_record(self) -> LoaderRecord | None:
        """See `InPlaceEngine.loader_record`."""
        return self._record

    def live_parameters(self) -> list[tuple[Mapping[str, Tensor], str]]:
        """None: the other process watches its own, and what is mapped here stays."""
        return []

    def paused(self, write: Callable[[], None]) -> None:
        """See `InPlaceEngine.paused`."""
        self._ask({"do": "update"})
        try:
            write()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except BaseException:
            self._tell_of_failure()
            raise
        self._ask({"do": "written"})

    def _tell_of_failure(self) -> None:
        """End an update that failed here; what the other process says of it is nothing new."""
        try:
            self._ask({"do": "failed"})
        except RolloutError:
            return

    def accept(self, policy_version: int) -> None:
        """See `InPlaceEngine.accept`."""
        self._ask({"do": "accept", "policy_version": policy_version})
        super().accept(policy_version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int
    ) -> list[Completion]:
        """See `RolloutEngine.generate`; errors are those of `VllmEngine.generate`."""
        _ = self.policy_version
        order = {
            "do": "generate", "prompts": [(each.prompt_id, each.tokens) for each in prompts],
            "sampling": asdict(sampling), "seed": seed,
        }  # fmt: skip
        try:
            answer, attached = self._ask(order)
        except RolloutError as error:
            if "vLLM failed" in str(error):
                super().void()
            raise
        num_bytes = 8 * answer["num_integers"]
        integers = np.frombuffer(attached[:num_bytes], dtype=np.int64)
        return decode(integers.tolist(), np.frombuffer(attached[num_bytes:], dtype=np.float32).tolist())

    def sleep(self) -> NoReturn:
        """CUDA IPC maps no memory that vLLM can give back; refused before launch."""
        raise RolloutError("an engine in a process of its own does not sleep; use rollout.process=trainer")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """It never sleeps."""

    def host_bytes_elsewhere(self) -> int:
        """See `InPlaceEngine.host_bytes_elsewhere`."""
        return int(self._ask({"do": "memory"})[0]["host_bytes"])

    @property
    def is_shut_down(self) -> bool:
        """See `InPlaceEngine.is_shut_down`."""
        return self._is_shut_down

    def shutdown(self) -> None:
        """See `InPlaceEngine.shutdown`; the process ends."""
        if self._is_shut_down:
            return
        super().void()
        self._is_shut_down = True
        try:
            _asked(self._process, self._channel, {"do": "shutdown"})
            self._process.wait(_END_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._channel.close()
            self.close_shared()

    def _ask(self, order: Message) -> tuple[Message, bytes]:
        if self._is_shut_down:
            raise RolloutError("the engine was shut down")
        return _asked(self._process, self._channel, order)


def _start() -> "tuple[subprocess.Popen[bytes], Channel]":
    own, others = socket.socketpair()
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mtrl.rollout.engine_process", str(others.fileno())]
    process = subprocess.Popen(
        command, pass_fds=(others.fileno(),), stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}
    )
    others.close()
    return process, Channel(own)


def _asked(process: "subprocess.Popen[bytes]", channel: Channel, order: Message) -> tuple[Message, bytes]:
    try:
        channel.send(order)
    except OSError as error:
        raise _lost(process) from error
    return _answer(process, channel)


def _answer(process: "subprocess.Popen[bytes]", channel: Channel) -> tuple[Message, bytes]:
    try:
        answer, attached = channel.receive()
    except (EOFError, OSError) as error:
        raise _lost(process) from error
    if "error" in answer:
        kind = getattr(errors, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, MtrlError):
            raise kind(answer["text"])
        raise RolloutError(f"the engine's process failed: {answer['error']}: {answer['text']}")
    return answer, attached


def _lost(process: "subprocess.Popen[bytes]") -> RolloutError:
    try:
        code = process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return RolloutError(f"the engine's process {process.pid} does not answer any more")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    return RolloutError(f"the engine's process {process.pid} {how}; what it said is above")
