"""What cannot be converted is refused with nothing touched; what goes along, and what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtrl.checkpoint.convert import hold
from mtrl.checkpoint.convert_plan import make_plan
from mtrl.checkpoint.format import Manifest, RunState, json_bytes
from mtrl.checkpoint.load import verify
from mtrl.models.durable import FileRecord, hash_file
from mtrl.tools.convert_checkpoint import main
from tests.unit.convert_toys import (
    config_of,
    flip,
    names_in,
    request,
    run,
    tensors_of,
    write_toys,
)

pytestmark = pytest.mark.one_stack


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(tmp_path_factory.mktemp("toys"), "llama", "olmoe", "qwen3")


# What is refused: a function of a folder of toys and an empty folder that gives arguments, and the message.
Refused = Callable[[Path, Path], list[str | Path]]


def truncated(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "source")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    return [source, tmp / "out", "--to", "mtrl"]


def of_another_config(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "source")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"intermediate_size": 80}))
    return [source, tmp / "out", "--to", "torch_dist"]


def occupied(toys: Path, tmp: Path) -> list[str | Path]:
    (tmp / "out").mkdir()
    (tmp / "out" / "mine").touch()
    return [toys / "llama", tmp / "out", "--to", "hf"]


def with_strange_partial(toys: Path, tmp: Path) -> list[str | Path]:
    (tmp / "out.partial").mkdir()
    (tmp / "out.partial" / "mine").touch()
    return [toys / "llama", tmp / "out", "--to", "torch_dist"]


def to_a_link(toys: Path, tmp: Path) -> list[str | Path]:
    (tmp / "empty").mkdir()
    (tmp / "out").symlink_to(tmp / "empty")
    return [toys / "llama", tmp / "out", "--to", "hf"]


def in_the_source(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "source")
    (tmp / "link").symlink_to(source)
    return [source, tmp / "link" / "out", "--to", "hf"]


def onto_itself(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "source")
    return [source, tmp / "source" / ".." / "source", "--to", "hf"]


def from_the_partial(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "out.partial")
    return [source, tmp / "out", "--to", "hf"]


def from_megatron(toys: Path, tmp: Path) -> list[str | Path]:
    run(toys / "llama", tmp / "megatron", "torch_dist")
    return [tmp / "megatron", tmp / "out", "--to", "hf"]


def optimizer_and_cast(toys: Path, tmp: Path) -> list[str | Path]:
    run(toys / "llama", tmp / "step_000000", "mtrl")
    return [tmp / "step_000000", tmp / "out", "--to", "mtrl", "--with-optimizer", "--dtype", "float32"]


def damaged_checkpoint(toys: Path, tmp: Path) -> list[str | Path]:
    run(toys / "llama", tmp / "step_000000", "mtrl")
    flip(tmp / "step_000000" / "model.safetensors")
    return [tmp / "step_000000", tmp / "out", "--to", "hf"]


def mxfp4(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "source")
    tensors = tensors_of(source) | {"model.norm.weight": torch.ones(48, dtype=torch.uint8)}
    save_file(tensors, source / "model.safetensors")
    return [source, tmp / "out", "--to", "hf"]


def without_weights(toys: Path, tmp: Path) -> list[str | Path]:
    source = shutil.copytree(toys / "llama", tmp / "source")
    (source / "model.safetensors").unlink()
    return [source, tmp / "out", "--to", "hf"]


REFUSED: dict[str, tuple[Refused, str]] = {
    "target holds something": (occupied, "OutputExistsError: {tmp}/out exists and is not an empty folder"),
    "target is a link": (to_a_link, "OutputExistsError: {tmp}/out exists and is not an empty folder"),
    "neighbour is somebody's": (with_strange_partial, "OutputExistsError: {tmp}/out.partial is where this"),
    "target in source": (in_the_source, "OutputExistsError: {tmp}/link/out lies in {tmp}/source, which"),
    "target is source": (onto_itself, "OutputExistsError: {tmp}/source lies in {tmp}/source, which is read"),
    "source is neighbour": (from_the_partial, "OutputExistsError: {tmp}/out.partial lies in {tmp}/out.part"),
    "no config": (from_megatron, "ModelError: {tmp}/megatron has no Hugging Face config; give a folder"),
    "optimizer from hf": (
        lambda toys, tmp: [toys / "llama", tmp / "out", "--to", "mtrl", "--with-optimizer"],
        "CheckpointError: optimizer state goes from mtrl checkpoints to mtrl checkpoints, not from hf to",
    ),
    "optimizer and dtype": (optimizer_and_cast, "CheckpointError: optimizer state belongs to the weights as"),
    "no source": (
        lambda toys, tmp: [tmp / "nowhere", tmp / "out", "--to", "hf"],
        "ModelError: there is no folder {tmp}/nowhere; nothing is downloaded",
    ),
    "unknown folder": (
        lambda toys, tmp: [toys, tmp / "out", "--to", "hf"],
        "ModelError: {toys} is neither a Hugging Face folder (config.json), nor an mtrl checkpoint (manif",
    ),
    "truncated": (truncated, "ModelError: {tmp}/source/model.safetensors is no whole safetensors file"),
    "no weights": (without_weights, "ModelError: {tmp}/source holds neither model.safetensors nor"),
    "another config": (of_another_config, "WeightError: weights do not match the llama weight table"),
    "damaged checkpoint": (
        damaged_checkpoint,
        "CheckpointError: {tmp}/step_000000 is damaged: model.safeten",
    ),
    "another format": (mxfp4, "ModelError: {tmp}/source has 1 tensors in a format that is not read"),
    "no key in Megatron": (
        lambda toys, tmp: [toys / "olmoe", tmp / "out", "--to", "torch_dist"],
        "ModelError: olmoe: queries and keys are normalised over all heads at once, and Megatron-Core's",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_and_nothing_is_touched(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Refused, message: str
) -> None:
    command = [str(each) for each in arguments(toys, tmp_path)]
    before = sorted(path for path in tmp_path.rglob("*") if not path.name.startswith("finished"))
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().err.startswith(message.format(tmp=tmp_path, toys=toys))
    after = [path for path in tmp_path.rglob("*") if not path.name.startswith("finished")]
    assert sorted(set(after) - {tmp_path / "out.partial"}) == sorted(set(before) - {tmp_path / "out.partial"})


STATE = RunState(
    step=7, phase="main", phase_step=3, num_records=5, seed=1, epoch=0, index=2, optimizer_steps=7,
    scheduler_steps=7, num_optimizer_tensors=1, policy_version=7, spec="megatron:d1", world_size=1,
    precision="bf16", metrics_bytes=0, evaluations_bytes=0, summary={}, versions={},
)  # fmt: skip


@pytest.fixture
def checkpoint(toys: Path, tmp_path: Path) -> Path:
    """An mtrl checkpoint with training state."""
    folder = tmp_path / "step_000007"
    run(toys / "qwen3", folder, "mtrl")
    (folder / "training").mkdir()
    (folder / "training" / "state.json").write_bytes(STATE.to_json())
    (folder / "training" / "config.json").write_bytes(json_bytes({"seed": 1}))
    for kind in ("optimizer", "rng"):
        save_file({"x": torch.randn(2000)}, folder / "training" / f"{kind}-00000-of-00001.safetensors")
    seal(folder)
    assert verify(folder) == []
    return folder


def seal(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    records = [(name, hash_file(folder / name)) for name in names_in(folder)]
    files = tuple(FileRecord(name=n, num_bytes=r.num_bytes, sha256=r.sha256) for n, r in records)
    (folder / "manifest.json").write_bytes(Manifest(step=7, files=files).to_json())


def test_training_state_goes_along_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "step_000007"
    run(checkpoint, target, "mtrl", "--with-optimizer")
    assert verify(target) == []
    assert names_in(target) == names_in(checkpoint)
    assert RunState.read(target) == STATE
    for name in names_in(checkpoint / "training"):
        assert (target / "training" / name).read_bytes() == (checkpoint / "training" / name).read_bytes()
    run(checkpoint, tmp_path / "step_000000", "mtrl")
    assert not (tmp_path / "step_000000" / "training").exists()
    assert verify(tmp_path / "step_000000") == []


def test_two_conversions_to_one_target_do_not_meet(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(make_plan(request(toys / "llama", tmp_path / "out"))):
        assert main([str(toys / "llama"), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "another conversion is writing" in capsys.readouterr().err
    assert main([str(toys / "llama"), str(tmp_path / "out"), "--to", "hf"]) == 0


def test_code_of_a_model_folder_goes_along_only_when_it_is_trusted(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(toys / "llama", tmp_path / "source")
    code = {"AutoModelForCausalLM": "modeling_x.Model"}
    (source / "config.json").write_text(json.dumps(config_of(source) | {"auto_map": code}))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.X", None]}}))
    (source / "modeling_x.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\n")
    run(source, tmp_path / "plain", "hf")
    out = capsys.readouterr().out
    assert "note: auto_map is left out of config.json" in out and "note: the tokenizer's code" in out
    assert "auto_map" not in config_of(tmp_path / "plain") and not list(tmp_path.glob("plain/*.py"))
    run(source, tmp_path / "trusted", "hf", "--trust-remote-code")
    assert config_of(tmp_path / "trusted")["auto_map"] == code
    assert (tmp_path / "trusted/modeling_x.py").read_bytes() == (source / "modeling_x.py").read_bytes()
    assert "note:" not in capsys.readouterr().out and not (tmp_path / "sung").exists()
