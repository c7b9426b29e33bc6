"""The process of an engine that has one of its own, beside its trainer's: ``own_process.py`` starts it.

It takes orders one after the other, and ends with its trainer. All of them together have a WORLD of their
own, in which ranks are as in the trainers'.
"""

import ctypes
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtrl.batch import Prompt
from mtrl.exchange import encode
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import RolloutError
from mtrl.parallel.groups import DEFAULT_TIMEOUT_S
from mtrl.parallel.spec import parse_rollout_spec
from mtrl.rollout.channel import Channel, Message
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.storages import StorageWatch
from mtrl.rollout.vllm_engine import VllmEngine

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class EngineProcess:
    """Carries out a trainer's orders; each method is one, named in a message's ``do``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: VllmEngine | None = None
        self._watch: StorageWatch | None = None

    def serve(self) -> None:
        """Until the trainer has ended, or says so."""
        orders: dict[str, Callable[[Message], tuple[Message, bytes]]] = {
            "create": self.create,
            "plan": self.plan,
            "update": self.update,
            "accept": self.accept,
            "generate": self.generate,
            "memory": self.memory,
        }
        while True:
            message, _ = self._channel.receive()
            if message["do"] == "shutdown":
                self.engine.shutdown()
                self._channel.send({})
                return
            try:
                answer, attached = orders[message["do"]](message)
            except EOFError:
                raise
            except Exception as error:  # it is the trainer's to raise
                answer, attached = {"error": type(error).__name__, "text": str(error)}, b""
            self._channel.send(answer, attached)

    @property
    def engine(self) -> VllmEngine:
        """The engine, once it was created."""
        if self._engine is None:
            raise RolloutError("the engine's process has no engine yet")
        return self._engine

    def create(self, message: Message) -> tuple[Message, bytes]:
        """Join the other engines' processes, build the engine, and share its weights."""
        torch.set_num_threads(message["num_threads"])
        _join(message)
        arguments = message["arguments"]
        arguments["model_dir"] = Path(arguments["model_dir"])
        arguments["spec"] = parse_rollout_spec(arguments["spec"])
        self._engine = VllmEngine.create(**arguments)
        shared, descriptors = self._engine.shared()
        self._watch = StorageWatch(self._engine.live_parameters())
        self._channel.send({"weights": shared, "num_descriptors": len(descriptors)})
        self._channel.send_descriptors(descriptors)
        layouts = {name: asdict(layout) for name, layout in self._engine.layouts.items()}
        return {"layouts": layouts}, b""

    def plan(self, message: Message) -> tuple[Message, bytes]:
        """Record the loader; see `InPlaceEngine.plan_weights`."""
        shapes = {name: tuple(shape) for name, shape in message["shapes"].items()}
        dtypes = {name: getattr(torch, dtype) for name, dtype in message["dtypes"].items()}
        return {"record": self.engine.plan_weights(shapes, dtypes).to_json()}, b""

    def update(self, message: Message) -> tuple[Message, bytes]:
        """Pause, let the trainer write, and derive what follows from the weights."""
        self.engine.void()
        assert self._watch is not None
        self._watch.check()
        self.engine.paused(self._let_write)
        return {}, b""

    def _let_write(self) -> None:
        self._channel.send({"paused": True})
        message, _ = self._channel.receive()
        if message["do"] != "written":
            raise RolloutError("the trainer could not write all weights")

    def accept(self, message: Message) -> tuple[Message, bytes]:
        """See `InPlaceEngine.accept`."""
        self.engine.accept(message["policy_version"])
        return {}, b""

    def generate(self, message: Message) -> tuple[Message, bytes]:
        """See `RolloutEngine.generate`; texts and answers of prompts stay with the trainer."""
        prompts = [
            Prompt(prompt_id=number, tokens=tuple(tokens), text="", answer="")
            for number, tokens in message["prompts"]
        ]
        sampling = message["sampling"]
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        found = self.engine.generate(prompts, SamplingSettings(**sampling), seed=message["seed"])
        integers, logprobs = encode(found)
        attached = integers.numpy().tobytes() + logprobs.numpy().tobytes()
        return {"num_integers": integers.numel(), "num_logprobs": logprobs.numel()}, attached

    def memory(self, message: Message) -> tuple[Message, bytes]:
        """The most that was resident."""
        return {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}, b""


def _join(message: Message) -> None:
    """Start torch.distributed among the engines' processes, through the trainers' store."""
    rank, world_size, timeout = message["rank"], message["world_size"], timedelta(seconds=DEFAULT_TIMEOUT_S)
    store: Any = dist.HashStore()
    if world_size > 1:
        common = dist.TCPStore(message["address"], message["port"], is_master=False, timeout=timeout)
        store = dist.PrefixStore(message["name"], common)
    backend = current_device().comm_backend
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def main() -> None:
    """Serve the trainer at the other end of the socket that was inherited."""
    # A signal to the whole process group is the trainer's to answer; this process ends when it does.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        EngineProcess(channel).serve()
    except (EOFError, OSError):
        sys.exit("the trainer's process has ended")


if __name__ == "__main__":
    main()
