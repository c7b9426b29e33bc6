"""Start ``mtrl/train.py`` as a user does, and read what it left."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.world import World

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


def forked(world: World, folder: Path, module: str, *arguments: str | Path) -> Finished:
    """What ``python -m MODULE ARGUMENTS`` prints and returns in ``folder``, without its imports' time."""
    found = world.run(
        run_captured,
        {"folder": str(folder), "module": module, "arguments": [str(each) for each in arguments]},
        size=1,
        start=False,
    )[0]
    return Finished(**found)


def run_captured(folder: str, module: str, arguments: list[str]) -> dict[str, Any]:
    """On a rank: call ``main`` of a module; its status and all that the process wrote."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status = importlib.import_module(module).main(arguments)
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        sys.stderr.flush()
        texts = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read()
        return {"status": status, **texts}


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
