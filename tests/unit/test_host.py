"""What host.py answers is what Megatron asks; and nobody but Megatron hears the answers."""

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mtrl.parallel import host
from mtrl.parallel.device import current_device

pytestmark = pytest.mark.skipif(
    current_device().kind == "cuda", reason="host.py does nothing where there is CUDA"
)
host.install()


@cache
def megatron_files() -> dict[str, str]:
    """Source text of every module of the installed Megatron-Core, by module name."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    return {
        ".".join(("megatron", "core", *path.relative_to(root).with_suffix("").parts)): path.read_text()
        for path in root.rglob("*.py")
    }


def names_defined_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@pytest.mark.parametrize("answer", host.answers(), ids=lambda answer: answer.name)
def test_what_is_answered_still_exists(answer: host.Answer) -> None:
    if answer.where.startswith("megatron"):
        assert answer.attribute in names_defined_in(megatron_files()[answer.where])
    else:
        owner: object = torch
        for part in answer.where.split(".")[1:]:
            owner = getattr(owner, part)
        assert hasattr(owner, answer.attribute)


@pytest.mark.parametrize("answer", host.answers(), ids=lambda answer: answer.name)
def test_what_is_answered_is_still_asked_by_megatron(answer: host.Answer) -> None:
    asked_as = {
        "torch.Tensor": f".{answer.attribute}(",
        "torch.nn.Module": f".{answer.attribute}(",
        "torch.distributed": f".{answer.attribute}(",
    }.get(answer.where, answer.attribute if answer.where.startswith("megatron") else answer.name)
    assert any(asked_as in source for source in megatron_files().values())


@pytest.mark.parametrize("constant", host.CONSTANTS)
def test_every_replaced_constant_still_occurs_in_megatron(constant: str) -> None:
    assert any(f'"{constant}"' in source or f"'{constant}'" in source for source in megatron_files().values())


def test_no_megatron_call_has_a_keyword_that_is_a_replaced_constant() -> None:
    # Keyword names are constants of the calling code too, so they would be renamed with them.
    calls = (
        keyword.arg
        for source in megatron_files().values()
        if "cuda=" in source
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    )
    assert not set(calls) & set(host.CONSTANTS)


def test_torch_itself_still_says_that_there_is_no_cuda() -> None:
    assert not torch.cuda.is_available()
    for ask in (
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.zeros(1).cuda(),
        lambda: torch.nn.Linear(1, 1).cuda(),
        torch.cuda.synchronize,
        torch.cuda.current_device,
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            ask()


def test_megatron_sees_the_answers_and_the_rest_of_torch() -> None:
    module = importlib.import_module("megatron.core.parallel_state")
    seen = module.torch
    assert isinstance(seen, ModuleType) and seen is not torch
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.Tensor is torch.Tensor and seen.nn is torch.nn
    assert not seen.cuda.is_available()


def test_constants_are_replaced_wherever_python_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        inspect.cleandoc("""
            def outer(device="cuda"):
                def inner():
                    return [kind in ("torch.cuda.FloatTensor", "other") for kind in ("torch.FloatTensor",)]
                return device, inner()
        """)
    )
    loader = host._Loader("megatron.sample", str(path), host._Finder(()))
    spec = importlib.util.spec_from_file_location("megatron.sample", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.outer() == ("cpu", [True])


def test_installing_twice_changes_nothing() -> None:
    before = list(sys.meta_path)
    host.install()
    assert sys.meta_path == before


def test_the_rng_answers_are_the_host_generator() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_splits_asked_as_numpy_are_numpy() -> None:
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    splits = utils.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert splits.tolist() == [1, 2] and not torch.is_tensor(splits)
