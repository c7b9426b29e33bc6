"""A conversion that was interrupted goes on with what is whole; one that proves wrong gets no name."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrl.checkpoint import megatron_write
from mtrl.checkpoint import prove as prove_module
from mtrl.checkpoint.convert import convert, finish, hold
from mtrl.checkpoint.convert_plan import JOURNAL, Plan, make_plan
from mtrl.checkpoint.prove import check_written, prove
from mtrl.checkpoint.torch_dist import dump_into
from mtrl.parallel.errors import CheckpointError
from mtrl.tools.convert_checkpoint import main
from tests.unit.convert_toys import (
    SMALL_GB,
    check_clean,
    check_same,
    flip,
    ignore,
    journal,
    names_in,
    request,
    run,
    tensors_of,
    write_toys,
)

pytestmark = pytest.mark.one_stack


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(
        tmp_path_factory.mktemp("toys"), "llama", "mixtral", "gpt oss", "qwen3 moe", "deepseek v3"
    )


class Disk:
    """``os.write``, that fails at its ``fail_at``-th call on a file of weights, and counts the files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.calls, self.fail_at, self.files, self.write = 0, fail_at, set[str](), os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".safetensors"):
            self.calls += 1
            self.files.add(Path(path).name)
            if self.calls == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(descriptor, data)


@pytest.mark.parametrize("fail_at", [1, 2, 5, 9])
def test_after_a_full_disk_the_same_command_goes_on(
    toys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fail_at: int,
) -> None:
    command = [str(toys / "mixtral"), str(tmp_path / "out"), "--to", "hf", "--shard-gb", str(SMALL_GB)]
    with monkeypatch.context() as patch:
        Disk(patch, fail_at)
        assert main(command) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "the same command goes on from" in err
    assert not (tmp_path / "out").exists()
    done = [json.loads(line)["name"] for line in journal(tmp_path / "out")[1:]]
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        assert main([*command, "--verify", "full"]) == 0
    shards = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert disk.files == shards - set(done)
    check_same(tmp_path / "out", tensors_of(toys / "mixtral"))
    check_clean(tmp_path / "out")


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Plan:
    """A conversion that was stopped after some shards."""
    plan = make_plan(request(source, target, **more))
    with monkeypatch.context() as patch, hold(plan), pytest.raises(OSError, match="No space"):
        Disk(patch, 12)
        convert(plan, ignore)
    assert len(journal(target)) > 5
    return plan


def files_written(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which files of weights going on with it writes."""
    with monkeypatch.context() as patch, hold(plan):
        disk = Disk(patch)
        convert(plan, ignore)
    check_written(plan, every_bit=True)
    return disk.files


def test_a_source_that_changed_is_converted_from_the_start(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(toys / "mixtral", tmp_path / "source")
    plan = interrupted(source, tmp_path / "out", monkeypatch)
    tensors = {name: -tensor for name, tensor in tensors_of(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert files_written(plan, monkeypatch) == set(plan.shards)
    finish(plan)
    check_same(tmp_path / "out", tensors)


@pytest.mark.parametrize("more", [{"dtype": torch.float32}, {"shard_bytes": 30_000}, {"to": "mtrl"}])
def test_another_request_begins_from_the_start(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    interrupted(toys / "mixtral", tmp_path / "out", monkeypatch)
    plan = make_plan(request(toys / "mixtral", tmp_path / "out", **more))
    assert files_written(plan, monkeypatch) == set(plan.shards)


def test_what_was_damaged_since_is_written_again_and_what_is_strange_deleted(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = interrupted(toys / "mixtral", tmp_path / "out", monkeypatch)
    partial = plan.request.partial
    done = {json.loads(line)["name"] for line in journal(tmp_path / "out")[1:]}
    flip(partial / min(done))
    (partial / "model.safetensors").write_bytes(b"strange")
    (partial / "training").mkdir()
    (partial / "training" / "x").write_bytes(b"strange")
    with (partial / JOURNAL).open("a") as file:
        file.write('{"name": "../mixtral/model.safetensors", "num_bytes": 1, "sha256": ""}\n{"name": "cut')
    assert files_written(plan, monkeypatch) == set(plan.shards) - done | {min(done)}
    finish(plan)
    check_same(tmp_path / "out", tensors_of(toys / "mixtral"))
    assert "model.safetensors" not in names_in(tmp_path / "out")


def torch_dist_interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> Plan:
    """A conversion to many small files that met a full disk at a chunk."""
    monkeypatch.setattr(megatron_write, "FILE_BYTES", 30_000)
    monkeypatch.setattr(megatron_write, "CHUNK_BYTES", 5000)
    left = [None] * calls

    def full(value: object, stream: IO[bytes]) -> None:
        if not left:
            stream.write(b"half of a chunk")
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        dump_into(value, stream)

    plan = make_plan(request(source, target, to="torch_dist"))
    with monkeypatch.context() as patch, hold(plan), pytest.raises(OSError, match="No space"):
        patch.setattr(megatron_write, "dump_into", full)
        convert(plan, ignore)
    return plan


@pytest.mark.parametrize("damage", ["none", "a file cut short", "a line cut short", "a line of zeros"])
@pytest.mark.parametrize("calls", [3, 40, 90])
@pytest.mark.parametrize("toy", ["qwen3 moe", "deepseek v3"])
def test_torch_dist_goes_on_with_the_files_that_are_whole(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: str, calls: int, damage: str
) -> None:
    plan = torch_dist_interrupted(toys / toy, tmp_path / "out", monkeypatch, calls)
    folder = plan.request.partial / ".release.partial"
    journal, whole = folder / "written.jsonl", len((folder / "written.jsonl").read_bytes().splitlines())
    assert bool(whole) == (calls > 3)
    if damage == "a file cut short" and whole:
        file = folder / f"__0_{whole // 2}.distcp"
        file.write_bytes(file.read_bytes()[:-1])
        whole //= 2
    elif damage == "a line cut short" and whole:
        journal.write_bytes(journal.read_bytes()[:-1])
        whole -= 1
    elif damage == "a line of zeros":
        journal.write_bytes(journal.read_bytes() + b"\0" * 100 + b"\n")
    before = [(folder / f"__0_{number}.distcp").stat() for number in range(whole)]
    counts = [0]
    with hold(plan):
        convert(plan, counts.append)
        list(prove(plan, level="full"))
        finish(plan)
    assert sum(counts) == plan.num_bytes
    after = [(tmp_path / "out" / "release" / f"__0_{number}.distcp").stat() for number in range(whole)]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in before]
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*.partial"))


def test_torch_dist_of_a_source_that_changed_begins_from_the_start(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(toys / "qwen3 moe", tmp_path / "source")
    torch_dist_interrupted(source, tmp_path / "out", monkeypatch, 40)
    tensors = {name: -tensor for name, tensor in tensors_of(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run(source, tmp_path / "out", "torch_dist")
    run(tmp_path / "out", tmp_path / "back", "hf", "--config", str(source))
    check_same(tmp_path / "back", tensors)


def test_torch_dist_that_was_whole_but_not_proved_is_only_proved(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, counts = make_plan(request(toys / "llama", tmp_path / "out", to="torch_dist")), [0]
    with hold(plan):
        convert(plan, ignore)
        monkeypatch.setattr(megatron_write, "dump_into", None)
        convert(plan, counts.append)
        list(prove(plan, level="full"))
    assert sum(counts) == plan.num_bytes


@pytest.mark.parametrize("to", ["hf", "mtrl", "torch_dist"])
def test_a_byte_that_differs_is_found_and_nothing_gets_the_name(
    toys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to: str,
) -> None:
    def convert_badly(plan: Plan, report: Callable[[int], None]) -> None:
        convert(plan, report)
        if to == "torch_dist":
            file = plan.request.partial / "release" / "__0_0.distcp"
            data = bytearray(file.read_bytes())
            at = data.index(
                next(iter(tensors_of(toys / "llama").values())).view(torch.uint8).numpy().tobytes()
            )
            data[at] ^= 1
            file.write_bytes(data)
        else:
            flip(plan.request.partial / "model.safetensors")

    command = [str(toys / "llama"), str(tmp_path / "out"), "--to", to, "--verify", "full"]
    with monkeypatch.context() as patch:
        patch.setattr("mtrl.tools.convert_checkpoint.convert", convert_badly)
        assert main(command) == 1
    assert "elements differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 0  # begins anew
    check_clean(tmp_path / "out")


@pytest.mark.parametrize("cut", ["file", "names"])
def test_even_the_shortest_proof_finds_what_is_missing(toys: Path, tmp_path: Path, cut: str) -> None:
    plan = make_plan(request(toys / "llama", tmp_path / "out"))
    with hold(plan):
        convert(plan, ignore)
        first = plan.request.partial / next(iter(plan.shards))
        if cut == "file":
            first.write_bytes(first.read_bytes()[:-1])
        else:
            index = plan.request.partial / "model.safetensors.index.json"
            (name, file) = next(iter(json.loads(index.read_text())["weight_map"].items()))
            tensors = load_file(plan.request.partial / file)
            tensors[name + "x"] = tensors.pop(name)
            save_file(tensors, plan.request.partial / file)
        with pytest.raises(CheckpointError, match=r"out\.partial is not what it should be: .*first|model-"):
            list(prove(plan, level="names"))
    assert journal(tmp_path / "out") == ["proved wrong"]


def test_headers_that_differ_are_each_named(toys: Path, tmp_path: Path) -> None:
    plan = make_plan(request(toys / "llama", tmp_path / "out", shard_bytes=10**9))
    with hold(plan):
        convert(plan, ignore)
    tensors = tensors_of(plan.request.partial)
    tensors["strange"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, plan.request.partial / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_written(plan, every_bit=True)
    for part in (
        "model.norm.weight is missing",
        "strange was not asked for",
        "lm_head.weight is torch.float16",
    ):
        assert part in str(caught.value)


def test_a_copied_file_that_differs_is_found(toys: Path, tmp_path: Path) -> None:
    plan = make_plan(request(toys / "llama", tmp_path / "out"))
    with hold(plan):
        convert(plan, ignore)
    (plan.request.partial / "tokenizer.json").write_text('{"version": "1.1"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: differs"):
        check_written(plan, every_bit=True)


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_logits_that_differ_are_refused(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    plan = make_plan(request(toys / "qwen3 moe", tmp_path / "out", to=to))
    with hold(plan):
        convert(plan, ignore)
        *_, line = prove(plan, level="logits")
        assert line.startswith("logits of 48 tokens within")
        monkeypatch.setattr(prove_module, "MAX_LOGIT_DIFFERENCE", -1.0)
        with pytest.raises(CheckpointError, match="logits differ by up to"):
            list(prove(plan, level="logits"))


def test_progress_ends_at_all_bytes(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to in ("hf", "torch_dist"):
        plan, counts, compared = make_plan(request(toys / "gpt oss", tmp_path / to, to=to)), [0], [0]
        with hold(plan):
            convert(plan, counts.append)
            list(prove(plan, level="full", report=compared.append))
        assert sum(counts) == sum(compared) == plan.num_bytes
    counts = [0]
    plan = interrupted(toys / "mixtral", tmp_path / "out", monkeypatch)
    with hold(plan):
        convert(plan, counts.append)
    assert sum(counts) == plan.num_bytes
