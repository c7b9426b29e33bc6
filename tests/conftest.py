"""What all tests share: where they may not run, and the ledger of what was left out (ledger.py)."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ledger import Entry, current_leg, lines, write

# Taken out of the environment, so that a pytest that a test starts does not count its tests twice.
LEDGER_FOLDER = os.environ.pop("MTRL_LEDGER", None)
for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ENTRIES: list[Entry] = []


@pytest.fixture
def record_refusal(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """For a test that shows that mtrl refuses something it should run one day: say what, for the ledger."""
    return lambda reason: request.node.user_properties.append(("refusal", reason))


def _why_gpu_tests_cannot_run() -> str:
    from mtrl.parallel.device import current_device

    return "" if current_device().kind == "cuda" else "needs an NVIDIA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a reason, what needs a part that this machine lacks."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_gpu_tests_cannot_run() if gpu else ""
    for item in gpu if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM, which is not installed"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Note tests that the command line left out."""
    ENTRIES.extend(Entry(category="deselected", test=item.nodeid, reason="-m") for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """With workers (pytest-xdist), all of which leave out the same tests: note what the last to end left out.

    Skips, expected failures and refusals come to the controller as reports.
    """
    ENTRIES[:] = [entry for entry in ENTRIES if entry.category != "deselected"]
    left_out = getattr(node, "workeroutput", {}).get("deselected", [])
    ENTRIES.extend(Entry(category="deselected", test=test, reason="-m") for test in left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker: tell the controller what was left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = [entry.test for entry in ENTRIES if entry.category == "deselected"]


def _reason_of_skip(longrepr: Any) -> str:
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return str(text).removeprefix("Skipped: ")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note files that skip themselves while they are read."""
    if report.skipped:
        reason = _reason_of_skip(report.longrepr)
        ENTRIES.append(Entry(category="skipped", test=report.nodeid, reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note skips, expected failures and refusals."""
    if report.skipped:
        expected = getattr(report, "wasxfail", None)
        category = "skipped" if expected is None else "xfailed"
        reason = _reason_of_skip(report.longrepr) if expected is None else expected
        ENTRIES.append(Entry(category=category, test=report.nodeid, reason=reason or "no reason given"))
    if report.when == "teardown":
        for key, value in report.user_properties:
            if key == "refusal":
                ENTRIES.append(Entry(category="refused", test=report.nodeid, reason=str(value)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts, and leave them for scripts/check.sh."""
    for line in lines(current_leg(), ENTRIES):
        terminalreporter.write_line(line)
    if LEDGER_FOLDER is not None:
        write(Path(LEDGER_FOLDER), current_leg(), ENTRIES)
