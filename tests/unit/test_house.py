"""The rules of the house (CONTRIBUTING.md) that a machine can check."""

import ast
import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house
from tests.house import LINKS, PRODUCT, READING_ORDER, ROOT, python_files, tree_of

pytestmark = pytest.mark.one_stack

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# What may not be imported while a pure file is: these hold text, numbers and ranks only.
HEAVY = ("megatron", "vllm")
PURE = {
    "mtrl.parallel.spec": ("torch", *HEAVY),
    "mtrl.parallel.layout": ("torch", *HEAVY),
    "mtrl.models.boxes": ("torch", *HEAVY),
    "mtrl.models.config": HEAVY,
    "mtrl.advantages": HEAVY,
    "mtrl.packing": HEAVY,
    "mtrl.config": HEAVY,
    "mtrl.weight_push.score": ("torch", *HEAVY),
    "mtrl.weight_push.fp8_kinds": ("torch", *HEAVY),
}
# Under these names the parts of mtrl would be loaded a second time.
BANNED_IMPORTS = {"parallel", "models", "tools"}


def place(path: str) -> int:
    """Where a product file stands in the reading order; an __init__ stands with its folder's last file."""
    folder = path.removesuffix("__init__.py") if path.endswith("__init__.py") else None
    matching = [
        position
        for position, entry in enumerate(READING_ORDER)
        if path == entry
        or (entry.endswith("/") and path.startswith(entry))
        or (folder and entry.startswith(folder))
    ]
    assert matching, (
        f"{path} has no place in READING_ORDER (tests/house.py); say after which files it is read"
    )
    return max(matching)


@pytest.mark.parametrize("path", python_files(*PRODUCT))
def test_a_file_imports_only_files_above_it(path: str) -> None:
    below = []
    for imported in house.imported_files(path):
        same_folder = place(imported) == place(path) and READING_ORDER[place(path)].endswith("/")
        if place(imported) >= place(path) and not same_folder and not path.endswith("__init__.py"):
            below.append(imported)
    assert not below, f"{path} imports {', '.join(below)}, which the reading order puts below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {path: house.imported_files(path) for path in python_files(*PRODUCT)}
    for path, imported in graph.items():
        if path.endswith("/__init__.py"):  # hands on what its folder holds
            folder = path.removesuffix("__init__.py")
            graph[path] = {other for other in imported if not other.startswith(folder)}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("module", "heavy"), PURE.items())
def test_pure_files_import_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", f"{module}: {done.stdout}{done.stderr}"


def test_no_module_in_mtrl_hides_one_of_python_or_of_a_dependency() -> None:
    # `torchrun mtrl/train.py` puts the folder mtrl/ first on sys.path.
    entries = [entry for entry in os.scandir(ROOT / "mtrl") if entry.is_dir() or entry.name.endswith(".py")]
    names = {Path(entry.name).stem for entry in entries} - {"__init__", "__pycache__"}
    hidden = sorted(names & (set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())))
    assert not hidden


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_the_packages_inside_mtrl_are_relative_symlinks(link: str, target: str) -> None:
    assert (ROOT / link).is_symlink() and os.readlink(ROOT / link) == target
    mode = subprocess.run(["git", "ls-files", "-s", link], cwd=ROOT, capture_output=True, text=True).stdout
    assert mode.startswith("120000 "), f"git holds {link} as {mode!r}"


@pytest.mark.parametrize("path", python_files())
def test_files_and_functions_stay_short(path: str) -> None:
    num_lines = len((ROOT / path).read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{path} has {num_lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {num_lines} lines"


def banned_things(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and name of what rule 13 forbids in a file, besides what test_banned_calls.py looks for."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.split(".")[0]))
        elif isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            found.append((node.lineno, "except: pass"))
    return [(line, name) for line, name in found if name in BANNED_IMPORTS | {"except: pass"}]


@pytest.mark.parametrize("path", python_files())
def test_no_file_holds_what_is_forbidden(path: str) -> None:
    found = banned_things(tree_of(path))
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "code",
    ["import parallel.spec", "from models import boxes", "try:\n    f()\nexcept OSError:\n    pass"],
)
def test_each_forbidden_thing_is_found(code: str) -> None:
    assert banned_things(ast.parse(code))


@pytest.mark.parametrize("code", ["import torch", "from mtrl import models", "from mtrl.models import boxes"])
def test_what_is_allowed_is_not_found(code: str) -> None:
    assert not banned_things(ast.parse(code))


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Written in pieces so that this file passes its own test.
    folders = "|".join(["work", "farm", "opt", "root", "tmp/lab", r"home/\w+", r"Users/\w+"])
    machine = re.compile(rf"(?<![\w.$}}*-])/(?:{folders})/[\w.]")
    address = re.compile(r"https?://(?P<host>[^\s/\"'`)>:]+)|\b\d{1,3}(?:\.\d{1,3}){3}\b")
    hosts = {"github.com", "arxiv.org", "docs.pytorch.org", "www.apache.org", "huggingface.co", "doi.org"}
    hosts |= {"www.w3.org", "json-schema.org"}  # the name spaces of SVG files and of JSON schemas
    addresses = {"127.0.0.1", "0.0.0.0"}
    found = []
    for path in house.files():
        if (ROOT / path).is_symlink() or path.startswith("requirements/") or path == "LICENSE":
            continue
        text = (ROOT / path).read_bytes().decode("utf-8", "ignore")
        found += [(path, match[0]) for match in machine.finditer(text)]
        for match in address.finditer(text):
            host = match["host"] or match[0]
            the_one = path == "scripts/setup_env.sh" and host == "download.pytorch.org"
            if host not in hosts | addresses and not host.startswith(("localhost", "127.")) and not the_one:
                found.append((path, match[0]))
    assert not found
