"""Counts what the tests leave out, and compares the counts with the committed ones in ledger.json.

Four categories: *skipped* tests, tests that are *expected to fail* (xfailed), *refused* configurations
(legal ones that mtrl does not run yet; a test shows that it says so, through the fixture
``record_refusal``), and *deselected* tests, which are only shown. The counts are per leg: the second
Python and Megatron-Core, or a machine with a GPU, leave out other tests.

``python -m tests.ledger check FOLDER`` adds up what the pytest runs of one ``make test`` left there.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

COMMITTED = Path(__file__).with_name("ledger.json")
COUNTED = ("skipped", "xfailed", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One test that was left out; ``category`` is one of ``COUNTED`` or "deselected"."""

    category: str
    test: str
    reason: str


def current_leg() -> str:
    """The name of this environment in ledger.json: Megatron-Core's two lines, CPU or CUDA."""
    stack = "py311" if sys.version_info < (3, 12) else "py312"
    return f"{stack}-{'cuda' if shutil.which('nvidia-smi') else 'cpu'}"


def write(folder: Path, leg: str, entries: Iterable[Entry]) -> None:
    """Leave the entries of one pytest run in ``folder``; the process id keeps runs apart."""
    record = {"leg": leg, "entries": [asdict(entry) for entry in entries]}
    (folder / f"{leg}-{os.getpid()}.json").write_text(json.dumps(record))


def read(folder: Path) -> dict[str, list[Entry]]:
    """What all runs left in ``folder``, by leg."""
    legs: dict[str, list[Entry]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        legs.setdefault(record["leg"], []).extend(Entry(**entry) for entry in record["entries"])
    return legs


def lines(leg: str, entries: Iterable[Entry]) -> list[str]:
    """The counts of a leg and their reasons, for people."""
    entries = list(entries)
    counts = Counter(entry.category for entry in entries)
    shown = ", ".join(f"{counts[category]} {category}" for category in (*COUNTED, "deselected"))
    reasons = Counter((entry.category, entry.reason) for entry in entries if entry.category in COUNTED)
    return [
        f"ledger {leg}: {shown}",
        *(f"  {number:3} {category}: {reason}" for (category, reason), number in sorted(reasons.items())),
    ]


def growth(legs: dict[str, list[Entry]], committed: dict[str, dict[str, int]]) -> list[str]:
    """One line for each count above its committed number; a leg without numbers is not compared."""
    found = []
    for leg, entries in legs.items():
        counts = Counter(entry.category for entry in entries)
        for category in COUNTED if leg in committed else ():
            allowed = committed[leg].get(category, 0)
            if counts[category] > allowed:
                found.append(
                    f"{leg}: {counts[category]} tests {category}, tests/ledger.json allows {allowed}; "
                    "mend them, or raise the number in a change that says why"
                )
    return found


def check(folder: Path) -> int:
    """Print every leg's counts; 1 when one has grown beyond the committed number, else 0."""
    legs, committed = read(folder), json.loads(COMMITTED.read_text())
    for leg, entries in sorted(legs.items()):
        print("\n".join(lines(leg, entries)))
        if leg not in committed:
            print("  no committed numbers for this leg: counted, not compared")
    found = growth(legs, committed)
    for line in found:
        print(f"ledger: {line}")
    if not legs:
        print("ledger: no test run left its counts")
    return bool(found)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "check":
        sys.exit("usage: python -m tests.ledger check FOLDER")
    sys.exit(check(Path(sys.argv[2])))
