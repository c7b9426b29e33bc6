"""Which device this process computes on.

The only place that asks whether there is a GPU. Everything else takes `DeviceInfo` or calls `current_device`.
Left out: moving tensors, what Megatron needs answered where there is no CUDA (host.py), and which packages
work here (capabilities.py).
"""

import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from mtrl.parallel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """The device of this process: ``cuda`` with nccl, or ``cpu`` with gloo. Never mixed."""

    kind: Literal["cuda", "cpu"]
    torch_device: torch.device
    comm_backend: Literal["nccl", "gloo"]


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
