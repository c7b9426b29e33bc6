"""Who tells an error, and with what it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl import last_words
from mtrl.last_words import leave, tell
from mtrl.parallel.errors import ConfigError, MismatchError, MtrlError, NonFiniteError, RolloutError

pytestmark = pytest.mark.one_stack


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept."""
    found: list[float] = []
    monkeypatch.setattr("mtrl.last_words.time.sleep", found.append)
    return found


def become(monkeypatch: pytest.MonkeyPatch, *, rank: int, local_rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)


@pytest.mark.parametrize(
    ("error", "has_started"),
    [(ConfigError("seed: wrong"), False), (MismatchError("apart"), True), (NonFiniteError("NaN"), True)],
)
def test_what_all_ranks_raise_is_told_by_one_of_each_node_and_the_others_wait(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    waited: list[float],
    error: MtrlError,
    has_started: bool,
) -> None:
    told = []
    for rank in range(16):
        become(monkeypatch, rank=rank, local_rank=rank % 8)
        assert tell(error, has_started=has_started) == last_words.EXIT_STATUS == 2
        told.append(capsys.readouterr().err)
    text = f"{type(error).__name__}: {error}\n"
    assert told == [text if rank % 8 == 0 else "" for rank in range(16)]
    assert waited == [last_words.GRACE_S] * 14


def test_what_one_rank_may_have_alone_is_told_by_it_with_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waited: list[float]
) -> None:
    for rank, beginning in ((0, ""), (5, "rank 5: ")):
        become(monkeypatch, rank=rank, local_rank=rank)
        tell(RolloutError("no room"), has_started=True)
        assert capsys.readouterr().err == f"{beginning}RolloutError: no room\n"
    assert waited == []


def test_torchrun_finds_the_error_where_it_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    become(monkeypatch, rank=0, local_rank=0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell(ConfigError("seed: wrong"), has_started=False)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "ConfigError: seed: wrong"
    assert (
        json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "ConfigError: seed: wrong"
    )


def test_an_error_that_only_echoes_another_ranks_waits_for_that_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waited: list[float]
) -> None:
    for name in ("os._exit", "sys.stdout.flush"):
        monkeypatch.setattr(f"mtrl.last_words.{name}", lambda *_: None)
    leave(RuntimeError("[pair.cc:537] Read error [127.0.0.1]:56502: Connection reset by peer. This is"))
    assert waited == [last_words.GRACE_S]
    leave(RuntimeError("out of memory"))
    assert waited == [last_words.GRACE_S] and "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [("MismatchError('apart')", 2, "MismatchError: apart"), ("KeyError('x')", 1, "KeyError: 'x'")],
)
def test_leaving_ends_the_process_without_what_runs_at_exit(error: str, status: int, last: str) -> None:
    code = (
        "import atexit, sys; from mtrl.last_words import leave; from mtrl.parallel.errors import *; "
        f"atexit.register(print, 'late'); print('early')\ntry: raise {error}\nexcept Exception as e: leave(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "early\n")
    assert done.stderr.splitlines()[-1] == last
    assert ("Traceback" in done.stderr) == (status == 1)
