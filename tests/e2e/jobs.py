"""Start ``mtrl/train.py`` as a user does, and read what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "mtrl" / "train.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A command that has ended."""

    status: int
    out: str
    err: str


def torchrun(folder: Path, *arguments: str, ours: bool = False, timeout_s: float = 240.0) -> Finished:
    """``torchrun mtrl/train.py ARGUMENTS`` on two ranks in ``folder``; ``ours``: scripts/torchrun.py."""
    program = [str(ROOT / "scripts" / "torchrun.py")] if ours else ["-m", "torch.distributed.run"]
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node=2"]
    return _run(folder, [sys.executable, *program, *launch, TRAIN, *arguments], timeout_s)


def python(folder: Path, *arguments: str, stdin: str = "", timeout_s: float = 120.0) -> Finished:
    """``python ARGUMENTS`` in ``folder``."""
    return _run(folder, [sys.executable, *arguments], timeout_s, stdin)


def _run(folder: Path, command: list[str], timeout_s: float, stdin: str = "") -> Finished:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The toy's reward is a module of the user's, found as docs/own_model.md says.
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout_s
    )
    return Finished(status=done.returncode, out=done.stdout, err=done.stderr)


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what depends on how fast the machine was."""
    return [{key: value for key, value in record.items() if not key.endswith("_s")} for record in records]


def run_main(folder: str, arguments: list[str]) -> dict[str, int]:
    """What a rank of a `World` runs in place of ``torchrun mtrl/train.py``."""
    from mtrl.train import main

    os.chdir(folder)
    sys.path.insert(0, folder)
    return {"status": main(arguments)}
