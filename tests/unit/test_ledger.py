"""The ledger counts, adds up over runs, and fails on growth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ledger
from tests.house import ROOT
from tests.ledger import Entry

pytestmark = pytest.mark.one_stack

LEAVES_OUT = """
import pytest

def test_skipped():
    pytest.skip("no such part")

@pytest.mark.xfail(reason="a known defect")
def test_expected_to_fail():
    assert False

def test_refused(record_refusal):
    record_refusal("a layout that does not run yet")

@pytest.mark.slow
def test_deselected():
    pass

def test_run():
    pass
"""


def entries(*categories: str) -> list[Entry]:
    return [Entry(category=category, test="t", reason="r") for category in categories]


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "loadfile"]], ids=["alone", "two workers"])
def test_every_way_to_leave_a_test_out_is_counted_once_with_its_reason(
    tmp_path: Path, workers: list[str]
) -> None:
    suite, counts = tmp_path / "suite", tmp_path / "counts"
    suite.mkdir()
    counts.mkdir()
    (suite / "test_some.py").write_text(LEAVES_OUT)
    (suite / "test_file.py").write_text(
        "import pytest\npytest.skip('a whole file', allow_module_level=True)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-m",
        "not slow",
        "-c",
        "pyproject.toml",
    ]
    done = subprocess.run(
        [*command, *workers, str(suite)],
        cwd=ROOT,
        env=os.environ | {"MTRL_LEDGER": str(counts)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = {(entry.category, entry.reason) for entry in ledger.read(counts)[ledger.current_leg()]}
    assert len(found) == len(ledger.read(counts)[ledger.current_leg()])
    assert found == {
        ("skipped", "no such part"),
        ("skipped", "a whole file"),
        ("xfailed", "a known defect"),
        ("refused", "a layout that does not run yet"),
        ("deselected", "-m"),
    }
    assert "2 skipped, 1 xfailed, 1 refused, 1 deselected" in done.stdout


def test_runs_of_one_leg_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.write(tmp_path, "a", entries("skipped"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    ledger.write(tmp_path, "a", entries("skipped", "refused"))
    ledger.write(tmp_path, "b", entries())
    assert ledger.read(tmp_path) == {"a": [*entries("skipped", "refused"), *entries("skipped")], "b": []}


def test_growth_of_any_category_is_found_and_names_both_numbers() -> None:
    legs = {
        "a": entries("skipped", "skipped", "xfailed", "refused", "deselected"),
        "unknown": entries("skipped"),
    }
    committed = {"a": {"skipped": 1, "xfailed": 1}}
    found = ledger.growth(legs, committed)
    assert [line.split(",")[0] for line in found] == ["a: 2 tests skipped", "a: 1 tests refused"]
    assert "allows 1" in found[0]


def test_the_committed_ledger_has_a_number_for_every_counted_category() -> None:
    for leg, numbers in json.loads(ledger.COMMITTED.read_text()).items():
        assert set(numbers) == set(ledger.COUNTED), leg
