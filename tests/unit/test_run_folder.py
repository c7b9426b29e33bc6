import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtrl.config import Config
from mtrl.config_load import load_config
from mtrl.parallel.errors import ConfigError, OutputExistsError
from mtrl.run_folder import RunFolder, open_run_folder, read_lines, write_atomically

ROOT = Path(__file__).resolve().parents[2]
SFT = str(ROOT / "configs" / "sft_qwen3_moe.yaml")


def config_for(path: Path, if_exists: str = "refuse") -> Config:
    return load_config(SFT, [f"output_dir={path}", f"if_exists={if_exists}"])


def opened(path: Path, if_exists: str = "refuse", rank: int = 0) -> RunFolder:
    return open_run_folder(config_for(path, if_exists), rank=rank)


def test_a_new_folder_holds_the_resolved_config(tmp_path: Path) -> None:
    folder = opened(tmp_path / "runs" / "a")
    assert load_config(folder.path / "config.yaml") == config_for(folder.path)


def test_an_empty_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert (opened(tmp_path / "a").path / "config.yaml").exists()


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"output_dir=ANOTHER_FOLDER, or if_exists=replace"):
        opened(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_what_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.symlink_to(tmp_path / "nowhere") if kind == "broken link" else path.write_text("mine")
    with pytest.raises(OutputExistsError):
        opened(path)


def test_replacing_moves_every_old_folder_aside_and_deletes_none(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in ("first", "second", "third"):
        (opened(path, "replace").path / "note").write_text(content)
    aside = [other for other in tmp_path.iterdir() if other.name.startswith("a.replaced-")]
    assert sorted((other / "note").read_text() for other in aside) == ["first", "second"]
    assert (path / "note").read_text() == "third"


def test_the_folder_one_stands_in_is_never_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "below")
    for path in (tmp_path / "a", Path("."), Path("..")):
        (tmp_path / "a" / "below" / "file").write_text("mine")
        with pytest.raises(OutputExistsError, match="holds the current folder"):
            opened(path, "replace")


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .* cannot be made or written to: Not a directory"):
        opened(tmp_path / "file" / "a")


def test_of_two_runs_started_at_once_on_one_folder_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path / "a")
    monkeypatch.setattr("mtrl.run_folder._is_taken", lambda _: False)  # both looked before either wrote
    with pytest.raises(OutputExistsError, match="taken by another run just now"):
        opened(tmp_path / "a")


def test_ranks_above_zero_neither_look_nor_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    folder = open_run_folder(config_for(tmp_path / "a"))
    folder.append_metrics({"step": 1})
    folder.append_evaluation({"step": 1})
    folder.write_summary({"accuracy": 1.0})
    assert not folder.is_writer and not (tmp_path / "a").exists()
    opened(tmp_path / "a")
    assert opened(tmp_path / "a", rank=1).path == tmp_path / "a"


_TWO_RANKS = """
import sys
import torch.distributed as dist
from mtrl.config_load import load_config
from mtrl.parallel.errors import OutputExistsError
from mtrl.run_folder import open_run_folder
try:
    folder = open_run_folder(load_config(sys.argv[1], [f"output_dir={sys.argv[2]}"]))
except OutputExistsError as error:
    sys.exit(f"REFUSED {error}")
dist.init_process_group("gloo")
dist.barrier()
print("RAN", flush=True)
dist.destroy_process_group()
"""


def test_under_torchrun_a_refusal_by_rank_0_ends_every_rank_and_is_said_once(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(_TWO_RANKS)
    opened(tmp_path / "a")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), SFT, str(tmp_path / "a")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "RAN" not in done.stdout and done.stderr.count("REFUSED") == 1, (
        done.stderr
    )


def test_each_record_is_one_whole_line_at_once(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a")
    for step in (1, 2):
        folder.append_metrics({"step": step, "text": "two\nlines"})
        assert [line["step"] for line in read_lines(folder.metrics_path)] == list(range(1, step + 1))


def test_a_line_cut_by_a_kill_is_left_out_and_no_file_is_no_lines(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a")
    assert read_lines(folder.metrics_path) == []
    folder.append_metrics({"step": 1})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_lines(folder.metrics_path) == [{"step": 1}]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a")
    folder.append_metrics({"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    folder.write_summary({"runs": [{"accuracy": -math.inf}]})
    assert read_lines(folder.metrics_path) == [{"loss": None, "grad_norm": None, "lr": 0.5}]
    assert json.loads(folder.summary_path.read_text()) == {"runs": [{"accuracy": None}]}


def test_a_summary_that_fails_half_way_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path / "a")
    folder.write_summary({"accuracy": 0.5})

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(folder.summary_path, "new")
    assert json.loads(folder.summary_path.read_text()) == {"accuracy": 0.5}


def test_a_written_summary_leaves_nothing_else_behind(tmp_path: Path) -> None:
    folder = opened(tmp_path / "a")
    for accuracy in (0.5, 0.9):
        folder.write_summary({"accuracy": accuracy})
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.yaml", "summary.json"]
    assert json.loads(folder.summary_path.read_text()) == {"accuracy": 0.9}
