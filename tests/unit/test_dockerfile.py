"""The Dockerfile builds fixed versions, and what the capability table says comes from source."""

import re

import pytest

from mtrl.parallel.capability_table import PACKAGES
from tests.house import ROOT

TEXT = (ROOT / "docker" / "Dockerfile").read_text()
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)$", TEXT, re.M))
SETTINGS = ("GPU_ARCH", "MAX_JOBS", "EXTRA_KERNELS")


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in SETTINGS])
def test_every_version_is_pinned_and_used(name: str) -> None:
    assert re.fullmatch(r"v?\d+(\.\d+)+(\.post\d+)?|[0-9a-f]{40}", ARGUMENTS[name])
    assert f"${{{name}}}" in TEXT


def test_nothing_is_taken_from_a_branch() -> None:
    sources = re.findall(r"git\+\S+", TEXT)
    assert sources and all(re.search(r"\.git@\$\{\w+\}", source) for source in sources)
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+-\S+$", TEXT, re.M)


def test_what_comes_from_source_has_a_line() -> None:
    """Built by default: what mtrl or vLLM's wheel does not bring and a config can ask for."""
    from_source = [package.name for package in PACKAGES if package.install.startswith("from source")]
    names = {"deep_ep": "DeepEP", "deep_gemm": "DeepGEMM", "flash_mla": "FlashMLA", "apex": "apex"}
    assert from_source and all(f"/{names[name]}.git@" in TEXT for name in from_source)
    by_default = TEXT.split("if [")[0]
    assert "/apex.git@" in by_default and "/DeepEP.git@" in by_default and ARGUMENTS["EXTRA_KERNELS"] == "0"


def test_what_is_copied_is_here() -> None:
    copied = [word for line in re.findall(r"^COPY (.+)$", TEXT, re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / path).exists() for path in copied)
