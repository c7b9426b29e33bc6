"""The folder of checkpoints: what can be seen, what is kept, what is noticed; without any model."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mtrl.checkpoint.folder import (
    LATEST,
    check_latest,
    clean,
    partial_path,
    point_latest,
    prune,
    publish,
    step_path,
    steps,
)
from mtrl.checkpoint.format import FORMAT, MANIFEST, STATE, VERSION, Manifest, RunState, json_bytes, problems
from mtrl.checkpoint.load import newest_whole, verify
from mtrl.models.durable import DurableFile, FileRecord, hash_file, replace_file, write_file
from mtrl.models.files import FolderWriter
from mtrl.parallel.errors import CheckpointError

RUN_STATE = RunState(
    step=3, phase="main", phase_step=3, num_records=10, seed=1, epoch=0, index=3, optimizer_steps=3,
    scheduler_steps=4, num_optimizer_tensors=2, policy_version=1, spec="megatron:d1", world_size=1,
    precision="fp32", metrics_bytes=12, evaluations_bytes=0, summary={"accuracy": 0.5}, versions={},
)  # fmt: skip


def make(folder: Path, step: int) -> Path:
    """A checkpoint of two small files."""
    out = FolderWriter(partial_path(folder, step))
    out.write("config.json", b"{}")
    out.write(STATE, replace(RUN_STATE, step=step).to_json())
    assert out.error is None
    write_file(partial_path(folder, step) / MANIFEST, Manifest(step=step, files=tuple(out.records)).to_json())
    target = publish(folder, step)
    point_latest(folder, step)
    return target


def test_a_checkpoint_is_seen_when_it_is_whole(tmp_path: Path) -> None:
    partial_path(tmp_path, 7).mkdir()
    assert steps(tmp_path) == [] == steps(tmp_path / "nowhere")
    make(tmp_path, 3)
    assert steps(tmp_path) == [3] and verify(step_path(tmp_path, 3)) == []
    assert clean(tmp_path) == [".step_000007.partial"] and clean(tmp_path) == []
    assert newest_whole(tmp_path, may_go_back=False) == (step_path(tmp_path, 3), [])


def test_the_last_ones_and_every_so_many_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        make(tmp_path, step)
    prune(tmp_path, keep_last=None, keep_every=None)
    assert steps(tmp_path) == list(range(1, 8))
    prune(tmp_path, keep_last=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7]
    prune(tmp_path, keep_last=1, keep_every=None)
    assert steps(tmp_path) == [7] and sorted(os.listdir(tmp_path)) == [LATEST, "step_000007"]


def test_latest_may_lag_behind_and_may_not_lie(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    check_latest(tmp_path)
    point_latest(tmp_path, 1)
    check_latest(tmp_path)  # a run may end between the two renames
    for content, reason in (
        (b"", "cannot be read"),
        (b"[]", "no JSON object"),
        (b'{"checkpoint": "step_000002"}', "not as it was written"),
        (
            json_bytes({"checkpoint": "step_000009", "manifest_sha256": ""}),
            "names step_000009, which is missing",
        ),
        (json_bytes({"checkpoint": "../step_000001", "manifest_sha256": ""}), "names no checkpoint"),
        (json_bytes({"checkpoint": "step_000002", "manifest_sha256": "0"}), "one of the two is damaged"),
    ):
        (tmp_path / LATEST).write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            check_latest(tmp_path)
    (tmp_path / LATEST).unlink()
    with pytest.raises(CheckpointError, match="is missing, beside 2 checkpoints"):
        check_latest(tmp_path)


def test_without_any_whole_checkpoint_nothing_is_gone_on_from(tmp_path: Path) -> None:
    (make(tmp_path, 1) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*\n.*config.json is missing"):
        newest_whole(tmp_path, may_go_back=True)


def test_a_manifest_vouches_for_itself(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    path = checkpoint / MANIFEST
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 3):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        assert any(MANIFEST in each for each in verify(checkpoint)), f"bit {bit}"
    path.write_bytes(good)
    checkpoint.rename(step_path(tmp_path, 4))
    assert verify(step_path(tmp_path, 4)) == ["its manifest is of step 3"]


def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    for name in ("../secret", "/etc/passwd", "training/../../secret"):
        records = (FileRecord(name=name, num_bytes=1, sha256="0"),)
        (tmp_path / MANIFEST).write_bytes(Manifest(step=1, files=records).to_json())
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            Manifest.read(tmp_path)


def test_a_manifest_of_another_shape_is_damage(tmp_path: Path) -> None:
    for files in ([], {"a": 1}, {"a": {"bytes": 1}}):
        body = {"format": FORMAT, "version": VERSION, "step": 1, "files": files}
        digest = hashlib.sha256(json_bytes(body)).hexdigest()
        (tmp_path / MANIFEST).write_bytes(json_bytes(body | {"sha256": digest}))
        with pytest.raises(CheckpointError, match="is no manifest"):
            Manifest.read(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="is missing"):
        Manifest.read(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    record = json.loads(Manifest(step=1, files=()).to_json())
    (tmp_path / MANIFEST).write_bytes(json_bytes(record | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2, this mtrl reads 1"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).write_bytes(json_bytes(record | {"format": "else"}))
    with pytest.raises(CheckpointError, match="of no mtrl checkpoint"):
        Manifest.read(tmp_path)


def test_a_state_is_read_as_it_was_written_and_checked(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / STATE).write_bytes(RUN_STATE.to_json())
    assert RunState.read(tmp_path) == RUN_STATE
    record = json.loads(RUN_STATE.to_json())
    for change, reason in (
        ({"step": "3"}, "step is '3', needs int"),
        ({"step": True}, "step is True, needs int"),
        ({"phase": "later"}, "phase is 'later', needs warm_start or main"),
        ({"summary": []}, r"summary is \[\], needs dict"),
    ):
        (tmp_path / STATE).write_bytes(json_bytes(record | change))
        with pytest.raises(CheckpointError, match=reason):
            RunState.read(tmp_path)


def test_files_are_what_their_records_say(tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20) + b"end"
    with DurableFile(tmp_path / "a") as file:
        for start in range(0, len(content), 1000):
            file.write(content[start : start + 1000])
        record = file.close()
    assert (tmp_path / "a").read_bytes() == content
    assert record == hash_file(tmp_path / "a")
    assert write_file(tmp_path / "b", content).sha256 == record.sha256
    assert problems(tmp_path, [record]) == []
    with pytest.raises(FileExistsError):
        DurableFile(tmp_path / "a")
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert "has 3 bytes" in problems(tmp_path, [record])[0]


def test_a_disk_that_fails_is_told_by_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    out = FolderWriter(tmp_path / "checkpoint")
    out.write("training/state.json", b"{}")
    monkeypatch.setattr(os, "write", real)
    out.write("config.json", b"{}")  # nothing more is done after an error
    assert out.error is not None and out.error.errno == 28
    assert str(out.error.filename).endswith("training/state.json")
    assert out.records == [] and not (tmp_path / "checkpoint" / "config.json").exists()
