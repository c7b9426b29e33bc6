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
