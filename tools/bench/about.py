"""Where, when and with what a figure was measured: what every page of ``tools/bench`` embeds."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit of the working tree, ``-dirty`` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def about(command: str, packages: Sequence[str]) -> dict[str, Any]:
    """``command`` and ``commit``, date, machine, and versions of Python and ``packages``, as JSON."""
    return {
        "command": command,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
