"""Every package of the accelerated stack: told from its namesakes, tried in safety, cited where used."""

import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mtrl.parallel import capabilities
from mtrl.parallel.capabilities import Machine, Survey, hardware_obstacle, survey
from mtrl.parallel.capability_features import FEATURES
from mtrl.parallel.capability_table import PACKAGES, Hardware, ImportSite
from mtrl.parallel.errors import ConfigError
from tests.house import ROOT

LIBRARIES = capabilities._libraries()
SITES = [(package.name, site) for package in PACKAGES for site in package.sites if site.library in LIBRARIES]
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
HOPPER = Machine(gpu="H200", sm=(9, 0), cuda=(12, 9))
NO_GPU = Machine(gpu=None, sm=None, cuda=None)


@pytest.fixture(scope="module")
def found() -> Survey:
    return survey()


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process and all its children: what a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def package_at(folder: Path, name: str, files: dict[str, str]) -> None:
    """Write an importable package into a folder."""
    for file, text in files.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def survey_beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Survey:
    """A survey by a fresh process for which ``folder`` holds packages."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return survey()


def test_a_package_is_usable_exactly_if_there_is_no_reason_against_it(found: Survey) -> None:
    assert [report.name for report in found.packages] == [package.name for package in PACKAGES]
    for report in found.packages:
        assert report.usable == (report.reason == "")
        assert report.real is not None or report.reason == "not installed"
        assert not report.usable or (report.real and report.version)


def test_what_mtrl_requires_is_found_with_its_version(found: Survey) -> None:
    for name in ("torch", "megatron-core"):
        assert found.package(name).usable
        assert found.package(name).version == importlib.metadata.version(name)
    assert found.package("torch").loads and "train" in found.ready


def test_a_feature_is_ready_only_where_it_is_built_and_a_package_for_it_is_usable(found: Survey) -> None:
    for feature in FEATURES:
        has_package = any(found.package(name).usable for name in feature.any_of)
        assert (feature.name in found.ready) <= (feature.built and has_package)


def test_looking_costs_little_more_than_importing_torch() -> None:
    torch = cpu_seconds([sys.executable, "-c", "import torch"])
    looking = cpu_seconds([sys.executable, "-c", "from mtrl.parallel.capabilities import survey; survey()"])
    # The child imports torch once; forks and the search for packages come on top, measured as 0.2 s.
    assert looking < 2 * torch + 1


@pytest.mark.parametrize(("package", "site"), SITES, ids=[f"{n}-{s.library}-{s.line}" for n, s in SITES])
def test_each_cited_import_site_stands_where_it_is_cited(package: str, site: ImportSite) -> None:
    line = (SITE_PACKAGES / site.file).read_text().splitlines()[site.line - 1].strip()
    assert line.startswith(site.text), f"{package}: {site.file}:{site.line} reads {line!r}"


def test_the_installed_megatron_and_vllm_are_versions_whose_sites_are_cited() -> None:
    cited = {site.library for package in PACKAGES for site in package.sites}
    installed = {library for library in LIBRARIES if not library.endswith("None")}
    assert installed <= cited


def test_packages_that_no_installed_library_imports_have_no_site_there() -> None:
    version = importlib.metadata.version("megatron-core")
    library = f"megatron-core {version}"
    sources = (SITE_PACKAGES / "megatron/core").rglob("*.py")
    text = "\n".join(path.read_text() for path in sources)
    for package in PACKAGES:
        if package.direct:
            continue
        top = package.module.split(".")[0]
        is_imported = any(
            f"{verb} {top}{end}" in text for verb in ("import", "from") for end in (" ", ".", "\n")
        )
        assert is_imported == any(site.library == library for site in package.sites), package.name


def test_a_package_that_nothing_would_call_is_reported_as_such(found: Survey) -> None:
    for report in found.packages:
        assert bool(report.called_by) == (
            any(site.reached for site in report.sites)
            or report.name in ("torch", "megatron-core", "vllm", "flash-linear-attention")
        )
    assert not found.package("nv-grouped-gemm").called_by


def test_an_unrelated_project_of_the_same_name_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_at(tmp_path, "apex", {"__init__.py": "raise SystemExit('never to be imported')"})
    report = survey_beside(tmp_path, monkeypatch).package("apex")
    assert report.real is False and report.loads is None
    assert report.reason.startswith("another project of the same name: its apex has no")


def test_a_distribution_without_the_module_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_at(
        tmp_path, "deepep-9.dist-info", {"METADATA": "Metadata-Version: 2.1\nName: deepep\nVersion: 9\n"}
    )
    report = survey_beside(tmp_path, monkeypatch).package("deep_ep")
    assert report.real is False and report.reason == "deepep 9 is installed, but has no module deep_ep"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its import ends the process: SIGSEGV"),
        ("import os; os._exit(3)", "its import ends the process: exit status 3"),
        ("raise OSError('libcudart.so.11: no such file')", "its import fails: OSError: libcudart.so.11"),
        ("x = 1", "lacks what is imported of it: fla.modules.l2norm.l2norm"),
    ],
)
def test_a_package_that_breaks_says_how_and_takes_nobody_down(
    code: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_at(tmp_path, "fla", {"__init__.py": code, "ops/gated_delta_rule/__init__.py": ""})
    monkeypatch.setattr(capabilities, "hardware_obstacle", lambda hardware, machine: "")
    result = survey_beside(tmp_path, monkeypatch)
    assert result.package("flash-linear-attention").reason.startswith(told)
    assert result.package("torch").loads


def test_deepep_that_megatron_would_pass_over_in_silence_says_which_symbol_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_2 = {
        "__init__.py": "class Buffer: pass\nclass ElasticBuffer: pass\n",
        "buffers/elastic.py": "",
        "utils/__init__.py": "",
    }
    package_at(tmp_path, "deep_ep", version_2)
    monkeypatch.setattr(capabilities, "hardware_obstacle", lambda hardware, machine: "")
    found = survey_beside(tmp_path, monkeypatch)
    report = found.package("deep_ep")
    assert report.real and report.loads
    assert report.reason.startswith("lacks what is imported of it: deep_ep.utils.EventHandle")
    assert found.obstacle("deepep") == f"deep_ep: {report.reason}"


def test_a_symbol_that_only_one_feature_needs_stands_in_the_way_of_that_feature_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_1 = {
        "__init__.py": "class Buffer: pass\n",
        "buffer.py": "",
        "utils.py": "class EventHandle: pass\nclass EventOverlap: pass\n",
    }
    package_at(tmp_path, "deep_ep", version_1)
    monkeypatch.setattr(capabilities, "hardware_obstacle", lambda hardware, machine: "")
    found = survey_beside(tmp_path, monkeypatch)
    assert found.package("deep_ep").usable
    assert found.obstacle("hybridep") == "deep_ep has no deep_ep.HybridEPBuffer"
    assert found.obstacle("deepep") == ""


def test_a_package_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_at(
        tmp_path,
        "fla",
        {"__init__.py": "import time; time.sleep(600)", "ops/gated_delta_rule/__init__.py": ""},
    )
    monkeypatch.syspath_prepend(tmp_path)
    program = (
        "import sys; from pathlib import Path; from mtrl.parallel import capability_probe as probe;"
        "probe.FORK_TIMEOUT_S = 0.5;"
        "probe.main(Path(sys.argv[1]), ['flash-linear-attention', 'machine'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, env=environment, timeout=200
    )
    said = json.loads((tmp_path / "flash-linear-attention.json").read_text())
    assert said == {"obstacle": "its import still ran after 0.5 s"}


@pytest.mark.parametrize(
    ("hardware", "machine", "told"),
    [
        (None, NO_GPU, ""),
        (Hardware(sm=(), or_newer=True, cuda=None, source=""), NO_GPU, "needs a GPU, found none"),
        (
            Hardware(sm=((9, 0),), or_newer=True, cuda=None, source=""),
            NO_GPU,
            "needs a GPU with sm_90 or newer, found none",
        ),
        (Hardware(sm=((9, 0),), or_newer=True, cuda=(12, 9), source=""), HOPPER, ""),
        (
            Hardware(sm=((10, 0),), or_newer=True, cuda=None, source=""),
            HOPPER,
            "needs a GPU with sm_100 or newer, found sm_90",
        ),
        (
            Hardware(sm=((9, 0), (10, 0)), or_newer=False, cuda=None, source=""),
            Machine(gpu="RTX", sm=(12, 0), cuda=(13, 0)),
            "needs a GPU with sm_90 or sm_100, found sm_120",
        ),
        (
            Hardware(sm=((9, 0),), or_newer=True, cuda=(12, 9), source=""),
            Machine(gpu="H200", sm=(9, 0), cuda=(12, 8)),
            "needs CUDA 12.9 or newer, torch has 12.8",
        ),
    ],
)
def test_hardware_that_does_not_suit_is_named_with_both_numbers(
    hardware: Hardware | None, machine: Machine, told: str
) -> None:
    assert hardware_obstacle(hardware, machine) == told


def test_an_unknown_name_is_an_error_with_the_closest(found: Survey) -> None:
    with pytest.raises(ConfigError, match="'depep' is no feature or package; did you mean deepep"):
        found.obstacle("depep")


def test_the_page_on_installing_names_every_package_and_its_way_in() -> None:
    page = (ROOT / "docs/install.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert {package.name for package in PACKAGES} <= rows
