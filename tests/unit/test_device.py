import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

from mtrl.parallel import device
from mtrl.parallel.errors import ConfigError


def test_the_device_is_the_one_torch_has_and_its_backend_fits() -> None:
    info = device.current_device()
    assert info.kind == info.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.distributed.is_backend_available(info.comm_backend)


def test_the_device_is_decided_once() -> None:
    assert device.current_device() is device.current_device()


def test_a_local_rank_that_is_not_a_number_is_an_error_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'first'"):
        device.current_device.__wrapped__()


def test_required_packages_are_usable_with_their_version() -> None:
    for name in ("torch", "megatron-core"):
        state = device.installed(name)
        assert state.usable and state.reason == ""
        assert state.version == importlib.metadata.version(name)


@pytest.mark.parametrize("name", device.packages())
def test_a_package_is_usable_exactly_if_there_is_no_reason_against_it(name: device.PackageName) -> None:
    state = device.installed(name)
    assert state.usable == (state.reason == "")
    module = device._REQUIREMENTS[name].module
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        assert state.reason == "not installed" and state.version is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without a GPU says")
def test_a_package_for_gpus_names_the_capability_it_misses() -> None:
    needs_a_gpu = device._Requirement(distributions=("torch",), module="torch", min_capability=(9, 0))
    assert device._obstacle(needs_a_gpu) == "needs a GPU with sm_90, found none"


def test_an_unrelated_project_of_the_same_name_is_not_taken_for_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "_capability_obstacle", lambda needed: "")
    stranger = device._Requirement(
        distributions=("pytest",), module="pytest", marker="pytest.buffer", min_capability=(8, 0)
    )
    assert "another project of the same name" in device._obstacle(stranger)


def test_looking_for_megatron_or_vllm_does_not_import_them() -> None:
    program = (
        "import sys; from mtrl.parallel import device;"
        "device.installed('megatron-core'); device.installed('vllm');"
        "sys.exit(any(name in sys.modules for name in ('megatron.core', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_extension_built_for_another_cuda_says_so() -> None:
    error = OSError("libcudart.so.11: cannot open shared object file")
    has = (torch.version.cuda or "none").split(".")[0]
    assert device._import_obstacle(error) == f"built for CUDA 11, torch has {has}"
