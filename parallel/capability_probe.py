"""The child process that tries packages: ``python -m mtrl.parallel.capability_probe FOLDER NAME ...``.

It imports torch once and forks for every package, so that one that crashes or hangs ends nothing but its
fork, and the imports share the cores. Each fork writes ``FOLDER/NAME.json``; what it prints goes to
``NAME.log``. The name ``machine`` stands for the GPU itself. Nothing may use CUDA before a fork.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtrl.parallel.capability_features import FEATURES
from mtrl.parallel.capability_table import PACKAGES, Package
from mtrl.parallel.device import current_device

MACHINE = "machine"
FORK_TIMEOUT_S = 60.0
_WIDTH = 4


def main(folder: Path, names: list[str]) -> None:
    """Try every package; returns when each has its file."""
    waiting, running = list(names), dict[int, tuple[str, float]]()
    while waiting or running:
        while waiting and len(running) < _WIDTH:
            name = waiting.pop(0)
            running[_fork(folder, name)] = (name, time.monotonic() + FORK_TIMEOUT_S)
        for pid, (name, deadline) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                _write(folder, name, {"obstacle": f"its import still ran after {FORK_TIMEOUT_S:g} s"})
            elif not ended:
                continue
            elif not (folder / f"{name}.json").exists():
                _write(folder, name, {"obstacle": f"its import ends the process: {_ending(status)}"})
            del running[pid]
        time.sleep(0.005)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _fork(folder: Path, name: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _write(folder, name, machine() if name == MACHINE else attempt(name))
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: a package's exit handlers are none of our business, and may hang.
        os._exit(0)


def _write(folder: Path, name: str, found: dict[str, object]) -> None:
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(found))
    partial.rename(folder / f"{name}.json")


def machine() -> dict[str, object]:
    """The device of this process: ``gpu`` (None on CPU), ``sm`` and torch's ``cuda``."""
    cuda = torch.version.cuda
    if current_device().kind == "cpu":
        return {"gpu": None, "sm": None, "cuda": cuda}
    place = current_device().torch_device
    return {
        "gpu": torch.cuda.get_device_name(place),
        "sm": list(torch.cuda.get_device_capability(place)),
        "cuda": cuda,
    }


def attempt(name: str) -> dict[str, object]:
    """Import a package, look for its symbols, and on a GPU run its kernel."""
    package = next(package for package in PACKAGES if package.name == name)
    if name == "megatron-core":
        importlib.import_module("mtrl.parallel.megatron_ready")
    try:
        importlib.import_module(package.module)
    except Exception as error:
        # A broken extension raises whatever its loader raises (OSError, RuntimeError, AttributeError).
        return {"obstacle": f"its import fails: {_told(error)}"}
    symbols = [*package.symbols, *(s for each in FEATURES if name in each.any_of for s in each.symbols)]
    return {"obstacle": "", "missing": missing(symbols), "kernel": _run_kernel(package)}


def missing(symbols: list[str]) -> dict[str, str]:
    """Those of ``module:name`` that cannot be imported, with why."""
    absent = {}
    for symbol in symbols:
        module, _, attribute = symbol.partition(":")
        try:
            getattr(importlib.import_module(module), attribute)
        except Exception as error:
            absent[symbol] = f"{module}.{attribute} ({_told(error)})"
    return absent


def _told(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _run_kernel(package: Package) -> str:
    kernel = KERNELS.get(package.name)
    if kernel is None:
        return "no kernel to run alone"
    if current_device().kind == "cpu":
        return "not run: no GPU"
    try:
        difference = kernel(current_device().torch_device)
    except Exception as error:
        return f"fails: {_told(error)}"
    # bf16 has 8 bits; the operands are of size one and at most 128 of them are added.
    return "ran" if difference < 0.1 else f"wrong: off by {difference:.3g}"


def _torch(place: torch.device) -> float:
    a = torch.randn(64, 128, device=place, dtype=torch.bfloat16)
    return _apart(a @ a.T, (a.float() @ a.float().T))


def _transformer_engine(place: torch.device) -> float:
    te: Any = importlib.import_module("transformer_engine.pytorch")
    layer = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16, device=place)
    x = torch.randn(64, 128, device=place, dtype=torch.bfloat16)
    return _apart(layer(x), x.float() @ layer.weight.float().T)


def _apex(place: torch.device) -> float:
    optimizers: Any = importlib.import_module("apex.optimizers")
    mine, theirs = (torch.nn.Parameter(torch.ones(256, device=place)) for _ in range(2))
    for parameter, kind in ((mine, torch.optim.AdamW), (theirs, optimizers.FusedAdam)):
        parameter.grad = torch.linspace(-1, 1, 256, device=place)
        kind([parameter], lr=0.1, weight_decay=0.0).step()
    return _apart(mine.detach(), theirs.detach())


def _grouped_gemm(place: torch.device) -> float:
    ops: Any = importlib.import_module("grouped_gemm.ops")
    x = torch.randn(64, 128, device=place, dtype=torch.bfloat16)
    w = torch.randn(2, 128, 128, device=place, dtype=torch.bfloat16)
    y = ops.gmm(x, w, torch.tensor([24, 40]), trans_b=False)
    return _apart(y, torch.cat([x[:24].float() @ w[0].float(), x[24:].float() @ w[1].float()]))


def _deep_gemm(place: torch.device) -> float:
    deep_gemm: Any = importlib.import_module("deep_gemm")
    a, b = (torch.randn(128, 128, device=place, dtype=torch.bfloat16) for _ in range(2))
    y = torch.empty(128, 128, device=place, dtype=torch.bfloat16)
    deep_gemm.bf16_gemm_nt(a, b, y)
    return _apart(y, a.float() @ b.float().T)


def _flash_attn(place: torch.device) -> float:
    flash_attn: Any = importlib.import_module("flash_attn")
    q, k, v = (torch.randn(1, 64, 2, 64, device=place, dtype=torch.bfloat16) for _ in range(3))
    y = flash_attn.flash_attn_func(q, k, v, causal=True)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _apart(y, wanted.transpose(1, 2))


def _linear_attention(place: torch.device) -> float:
    fla: Any = importlib.import_module("fla.modules.fused_cross_entropy")
    logits = torch.randn(64, 1000, device=place, dtype=torch.bfloat16)
    targets = torch.arange(64, device=place)
    wanted = torch.nn.functional.cross_entropy(logits.float() / 0.7, targets, reduction="none")
    return _apart(fla.cross_entropy_loss(logits, targets, logit_scale=1 / 0.7)[0], wanted)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest wanted number."""
    return float((found.float() - wanted.float()).abs().max() / wanted.abs().max())


# deep_ep and nvshmem need two ranks; flash_mla's interface differs between its versions.
KERNELS: dict[str, Callable[[torch.device], float]] = {
    "torch": _torch,
    "transformer-engine": _transformer_engine,
    "apex": _apex,
    "nv-grouped-gemm": _grouped_gemm,
    "deep_gemm": _deep_gemm,
    "flash-attn": _flash_attn,
    "flash-linear-attention": _linear_attention,
}
"""Written from the packages' documents; not yet run on a GPU, torch's apart."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
