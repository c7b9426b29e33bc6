"""When kernels are built: on a GPU, with Triton and a C compiler, and what then turns queries and keys."""

import importlib.util
import itertools
import shutil

import pytest
import torch

from mtrl.models.backends.torch_native import rotation
from mtrl.parallel import kernels
from mtrl.parallel.device import DeviceInfo

CPU = DeviceInfo(kind="cpu", torch_device=torch.device("cpu"), comm_backend="gloo")
GPU = DeviceInfo(kind="cuda", torch_device=torch.device("cuda", 0), comm_backend="nccl")


def test_kernels_are_built_on_a_gpu_that_has_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}
    for device, triton, compiler, cc in itertools.product(
        (CPU, GPU), (None, "triton"), (None, "clang"), ("", "mycc")
    ):
        monkeypatch.setattr(kernels, "current_device", lambda of=device: of)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, of=triton: of)
        monkeypatch.setattr(shutil, "which", lambda name, of=compiler: of if name == of else None)
        monkeypatch.setenv("CC", cc)
        answers[device.kind, triton, compiler, cc] = kernels.can_build_kernels.__wrapped__()
    expected = {
        ("cuda", "triton", "clang", ""),
        ("cuda", "triton", "clang", "mycc"),
        ("cuda", "triton", None, "mycc"),
    }
    assert {each for each, answer in answers.items() if answer} == expected


@pytest.mark.parametrize("can_build", [False, True])
def test_queries_and_keys_are_turned_by_megatron_where_nothing_can_be_built(
    monkeypatch: pytest.MonkeyPatch, can_build: bool
) -> None:
    monkeypatch.setattr(rotation, "can_build_kernels", lambda: can_build)
    assert rotation.rotation_kernel() == ("torch.compile" if can_build else "megatron")
