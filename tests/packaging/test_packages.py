"""What is built from the repository, installed away from it: one package, each module under one name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import house
from tests.house import PRODUCT, ROOT

pytestmark = pytest.mark.one_stack

# Imports every module of the folder argv[1] and stops at a file that was loaded under two names. The checkout
# is taken off the path, for an editable install puts it there.
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
site, checkout = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.path[:] = [site, *(entry for entry in sys.path if entry not in ("", checkout))]
import mtrl
assert mtrl.__file__.startswith(site), mtrl.__file__
has_vllm = importlib.util.find_spec("vllm") is not None
num_modules = 1
for info in pkgutil.walk_packages(mtrl.__path__, "mtrl."):
    try:
        importlib.import_module(info.name)
    except ImportError as error:
        # The peer's side of a benchmark runs in an environment that has the peer.
        is_peers = (info.name, error.name) == ("mtrl.tools.bench.trl_grpo", "trl")
        assert is_peers or (not has_vllm and "vllm" in str(error)), (info.name, error)
    num_modules += 1
for name in ("parallel", "models", "tools"):
    spec = importlib.util.find_spec(name)
    assert spec is None or not str(spec.origin).startswith((site, checkout)), spec
# The checkout may hold the environment, whose packages are others' and may be loaded under two names.
ours = (site, *(f"{checkout}/{folder}/" for folder in ("mtrl", "parallel", "models", "tools", "tests")))
names = {}
for name, module in list(sys.modules.items()):
    path = getattr(module, "__file__", None)
    if path and path.startswith(ours):
        names.setdefault(path, []).append(name)
twice = {path: found for path, found in names.items() if len(found) > 1}
assert not twice, twice
assert all(path.startswith(site) for path in names), names
print(num_modules)
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel or sdist of ``source`` in ``target``, by the hook that pip calls."""
    target.mkdir()
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, target], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files as a fresh clone has them, symlinks as symlinks."""
    folder = tmp_path_factory.mktemp("clone")
    for path in house.files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    return build("sdist", checkout, checkout.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build("wheel", checkout, checkout.parent / "wheel")


def files_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_once_under_mtrl(wheel: Path) -> None:
    modules = {path for path in files_in(wheel) if ".dist-info/" not in path}
    expected = {
        f"{house.module_of(path).replace('.', '/')}{'/__init__' if path.endswith('/__init__.py') else ''}.py"
        for path in house.python_files(*PRODUCT)
    }
    assert modules == expected | {"mtrl/py.typed"}


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    again = build("wheel", folder, tmp_path / "wheel")
    assert files_in(again) == files_in(wheel)


def test_the_sdist_holds_configs_tests_and_licence(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path
        for path in house.files()
        if path.startswith(("configs/", "tests/", "requirements/", "scripts/"))
        or path in ("LICENSE", "Makefile")
    }
    assert not sorted(wanted - names)


def test_an_installed_wheel_imports_from_an_empty_folder_each_module_under_one_name(
    wheel: Path, tmp_path: Path
) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(site), str(ROOT)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == len(house.python_files(*PRODUCT))
