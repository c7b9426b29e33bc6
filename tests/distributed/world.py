"""Runs a function on every rank of a gloo world, cheaply and in isolation.

Importing torch and Megatron takes seconds, so one *nursery* process imports them once and forks the ranks of
every call: each call gets fresh processes (nothing to clean up between tests), at the cost of a fork. ::

    def total(start: int) -> dict[str, object]:           # runs on every rank, torch.distributed started
        tensor = torch.full((2,), start + dist.get_rank())
        dist.all_reduce(tensor)
        return {"sum": tensor, "rank": dist.get_rank()}

    def test_total(world):
        results = world.run(total, {"start": 3}, size=4)      # one result a rank, in rank order

The function is named by module and name, its arguments are JSON, its result is JSON in which tensors may
stand anywhere (they travel as safetensors). A rank that raises, dies or hangs fails the call with that rank's
traceback. A function imports vLLM itself: it starts threads, which a fork would lose.
"""

import contextlib
import errno
import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "pytest",
    "safetensors.torch",
    "torch._dynamo",  # torch's optimizers import it at their first step
    "mtrl.parallel.groups",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "transformers.models.auto.tokenization_auto",
    "mtrl.run",
)
ENGINE_PRELOADED = (
    "aiohttp",
    "fastapi",
    "networkx",
    "openai.types.chat",
    "openai.types.responses",
    "torch._inductor.compile_fx",
    "xgrammar",
)
"""Of others, what vLLM imports: half of its time. It itself changes torch, and belongs in the ranks."""
DEFAULT_TIMEOUT_S = 120.0
GRACE_S = 3.0
"""How long the other ranks may go on after one has failed: they usually wait in a collective for it."""


class WorldError(AssertionError):
    """A rank raised, died or hung; the message holds every rank's story."""


class World:
    """Starts the nursery at the first `run`; `close` ends it.

    ``preload`` names more modules to import before forking; those that are not installed are passed over.
    ``path`` are folders that its processes find modules in before any other.
    """

    def __init__(self, *, preload: tuple[str, ...] = (), path: tuple[Path, ...] = ()) -> None:
        self._preload, self._path = preload, [str(folder) for folder in path]
        self._nursery: subprocess.Popen[str] | None = None

    def run(
        self,
        function: Callable[..., object],
        arguments: dict[str, object] | None = None,
        /,
        *,
        size: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        start: bool = True,
        environment: dict[str, str] | None = None,
    ) -> list[Any]:
        """Call ``function(**arguments)`` on ranks 0..size-1 and return their results in rank order.

        ``start=False`` leaves torch.distributed to the function; the environment is torchrun's either way.

        Raises:
            WorldError: a rank raised, died, or was still running after ``timeout_s``.
        """
        with tempfile.TemporaryDirectory(prefix="mtrl-world-") as name:
            request = {
                "folder": name,
                "module": function.__module__,
                "function": function.__qualname__,
                "arguments": arguments or {},
                "size": size,
                "timeout_s": timeout_s,
                "start": start,
                "environment": environment or {},
                "path": [*self._path, *sys.path],
            }
            outcomes = self._ask(request)
            folder = Path(name)
            if any(outcome != "done" for outcome in outcomes):
                raise WorldError(_story(folder, function.__qualname__, outcomes))
            return [_read_result(folder, rank) for rank in range(size)]

    def close(self) -> None:
        if self._nursery is not None and self._nursery.stdin is not None:
            self._nursery.stdin.close()
            self._nursery.wait(timeout=30)
            if self._nursery.stdout is not None:
                self._nursery.stdout.close()
        self._nursery = None

    def _ask(self, request: dict[str, object]) -> list[str]:
        if self._nursery is None or self._nursery.poll() is not None:
            self._nursery = _start_nursery(self._preload, self._path)
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(request) + "\n")
        self._nursery.stdin.flush()
        answer = self._nursery.stdout.readline()
        if not answer:
            raise WorldError(f"the process that starts ranks ended with {self._nursery.wait()}")
        outcomes: list[str] = json.loads(answer)
        return outcomes


def _start_nursery(preload: tuple[str, ...], path: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [*path, str(ROOT), os.environ.get("PYTHONPATH")])
    )
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed.world", *preload],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        text=True,
    )


def _story(folder: Path, function: str, outcomes: list[str]) -> str:
    lines = [f"{function} failed: " + ", ".join(f"rank {r} {o}" for r, o in enumerate(outcomes))]
    for rank, outcome in enumerate(outcomes):
        log = folder / f"rank{rank}.log"
        if outcome != "done" and log.exists():
            lines += [f"--- rank {rank}: {outcome}", log.read_text(errors="replace")[-6000:]]
    return "\n".join(lines)


def _serve(preload: list[str]) -> None:
    """The nursery: for each line read, fork a request's ranks and answer one outcome a rank."""
    # Whatever a library prints must not reach the pipe that carries answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in PRELOADED:
        importlib.import_module(module)
    for module in preload:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    # What is imported stays: ranks need not walk it, nor get copies of its pages, at each collection.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        port = _free_port()
        pids = [_fork(request, rank, port) for rank in range(request["size"])]
        answers.write(json.dumps(_watch(request, pids)) + "\n")
        answers.flush()


def _free_port() -> int:
    """A port that nobody listens on, below those that the system gives to connections on its own."""
    while True:
        port = random.randrange(20000, 32000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _become_rank(request, rank, port)
        _write_result(Path(request["folder"]), rank, _call(request))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():
            child.terminate()  # as Megatron's torch_dist leaves one that would outlive us
        # Not sys.exit: destructors of process groups may wait for ranks that have already gone.
        os._exit(status)


def _become_rank(request: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(Path(request["folder"]) / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    size = str(request["size"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.update(request["environment"])
    sys.path[:] = request["path"]


def _call(request: dict[str, Any]) -> object:
    import torch.distributed as dist

    from mtrl.parallel import groups

    function = getattr(importlib.import_module(request["module"]), request["function"])
    if request["start"]:
        groups.init_distributed(timeout_s=request["timeout_s"])
    result = function(**request["arguments"])
    if dist.is_initialized():
        # Nobody may leave while another rank still sends to it.
        dist.barrier()
    return result


def _watch(request: dict[str, Any], pids: list[int]) -> list[str]:
    """Wait for all ranks; end those that outlast the timeout or, by `GRACE_S`, another rank's failure."""
    outcomes: dict[int, str] = {}
    deadline = time.monotonic() + request["timeout_s"]
    while len(outcomes) < len(pids):
        for pid in pids:
            if pid not in outcomes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    outcomes[pid] = _outcome(os.waitstatus_to_exitcode(status))
                    if outcomes[pid] != "done":
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            _end([pid for pid in pids if pid not in outcomes], outcomes)
        time.sleep(0.005)
    return [outcomes[pid] for pid in pids]


def _outcome(code: int) -> str:
    if code == 0:
        return "done"
    return "raised" if code > 0 else f"died of {signal.Signals(-code).name}"


def _end(pids: list[int], outcomes: dict[int, str]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcomes[pid] = "still ran when it was ended"


def _write_result(folder: Path, rank: int, result: object) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    plain = _flatten(result, tensors)
    save_file(tensors, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(plain))


def _read_result(folder: Path, rank: int) -> object:
    from safetensors.torch import load_file

    plain = json.loads((folder / f"rank{rank}.json").read_text())
    return _restore(plain, load_file(folder / f"rank{rank}.safetensors"))


def _flatten(value: Any, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().clone().contiguous()
        return {"__tensor__": key}
    if isinstance(value, dict):
        return {str(key): _flatten(each, tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(each, tensors) for each in value]
    return value


def _restore(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {key: _restore(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_restore(each, tensors) for each in value]
    return value


if __name__ == "__main__":
    _serve(sys.argv[1:])
