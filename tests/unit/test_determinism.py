"""The environment that deterministic training needs, and torch's switch."""

import pytest
import torch

from mtrl.parallel.determinism import (
    ENVIRONMENT,
    check_environment,
    deterministic_algorithms,
    set_environment,
)
from mtrl.parallel.errors import ConfigError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken away after it
        monkeypatch.delenv(name)


def test_what_is_not_set_is_set_so_that_the_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("NCCL_ALGO", "Tree")
    set_environment()
    check_environment()
    assert {name: os.environ[name] for name in ENVIRONMENT} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Tree",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"), ("NCCL_ALGO", "NVLS")],
)
def test_a_variable_that_stands_against_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"the environment has {name}={value}; unset it, or write"):
        check_environment()


def test_the_switch_is_put_back() -> None:
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True), deterministic_algorithms(False):
        assert torch.are_deterministic_algorithms_enabled(), "a user's own switch stays on"
