"""``tools/convert_checkpoint.py`` as a user starts it: what it prints, leaves, survives and refuses."""

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtrl.checkpoint.load import verify
from mtrl.checkpoint.megatron_weights import checkpoint_map
from mtrl.checkpoint.torch_dist import read_index
from mtrl.models.families import load_model_config
from mtrl.models.files import SafetensorsWriter
from mtrl.models.safetensors_header import read_headers
from tests.distributed.world import World
from tests.e2e.jobs import ROOT, Finished, forked, python, run_main
from tests.family_toys import build_family_toy, save

TOOL = str(ROOT / "tools" / "convert_checkpoint.py")
SMALL_GB = str(20_000 / 2**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    save(build_family_toy("llama"), folder / "llama")
    return save(build_family_toy("qwen3 moe", seed=4), folder / "model")


def tool(folder: Path, *arguments: str | Path) -> Finished:
    return python(folder, TOOL, *map(str, arguments))


def convert(world: World, folder: Path, *arguments: str | Path) -> Finished:
    """The same, where what is tested is not the process."""
    return forked(world, folder, "mtrl.tools.convert_checkpoint", *arguments)


@pytest.fixture(scope="module")
def checkpoint(world: World, toy: Path) -> Path:
    """What a run of two ranks left."""
    world.run(
        run_main,
        {"folder": str(toy), "arguments": ["sft.yaml", "output_dir=runs/to_convert"]},
        size=2,
        start=False,
    )
    return toy / "runs" / "to_convert" / "checkpoints" / "step_000004"


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes."""
    found: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        found |= {name: data[each.begin : each.end] for name, each in read_headers(file).items()}
    return found


def test_a_dry_run_says_what_would_be_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    done = tool(tmp_path, model, "out", "--to", "hf", "--shard-gb", SMALL_GB, "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"hf {model} -> hf {tmp_path / 'out'}: qwen3_moe, 135 tensors, 0.00 GB\n")
    assert "files: model-00001-of-" in done.out and "copied: generation_config.json" in done.out
    assert "dtypes: 135 float32" in done.out and done.out.endswith("nothing was written (--dry-run)\n")
    assert not list(tmp_path.iterdir())


def test_there_and_back_with_logits_compared(world: World, model: Path, tmp_path: Path) -> None:
    there = convert(world, tmp_path, model, "megatron", "--to", "torch_dist", "--verify", "logits")
    assert there.status == 0, there.err
    back = convert(world, tmp_path, "megatron", "back", "--to", "hf", "--config", model, "--verify", "logits")
    assert back.status == 0, back.err
    for done, whose in ((there, "mtrl"), (back, "transformers")):
        assert "proved: 135 tensors, " in done.out and "; every bit of them compared with" in done.out
        assert "proved: logits of 48 tokens within " in done.out and f"({whose} against mtrl)" in done.out
    assert there.out.endswith("written: megatron\n") and back.out.endswith("written: back\n")
    assert there.err == "", "nothing but progress, on terminals only"
    assert weights(tmp_path / "back") == weights(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron"]


def test_a_conversion_that_is_killed_goes_on(model: Path, tmp_path: Path) -> None:
    command = [str(model), "out", "--to", "hf", "--shard-gb", SMALL_GB]
    killing = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from mtrl.tools.convert_checkpoint import main
write, calls = os.write, []
def kill(descriptor, data):
    if os.readlink(f"/proc/self/fd/{{descriptor}}").endswith(".safetensors"):
        calls.append(descriptor)
        if len(calls) == 20:
            write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, data)
os.write = kill
main(sys.argv[1:])
"""
    assert python(tmp_path, "-c", killing, *command).status == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    lines = (partial / "finished.jsonl").read_text().splitlines()[1:]
    done = {name: (partial / name).stat() for name in (json.loads(line)["name"] for line in lines)}
    assert not (tmp_path / "out").exists() and len(done) > 10
    again = tool(tmp_path, *command, "--verify", "full")
    assert again.status == 0, again.err
    for name, state in done.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (state.st_ino, state.st_mtime_ns), name
    assert weights(tmp_path / "out") == weights(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_control_c_ends_it_with_one_line(model: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from mtrl.tools.convert_checkpoint import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
fsync = os.fsync
def interrupt(descriptor):
    os.fsync = fsync
    os.kill(os.getpid(), signal.SIGINT)
os.fsync = interrupt
sys.exit(main(sys.argv[1:]))
"""
    done = python(tmp_path, "-c", code, str(model), "out", "--to", "hf")
    assert done.status == 1
    assert done.err == "stopped; the same command goes on from out.partial\n"


def test_a_full_disk_is_an_error_of_one_line(model: Path, tmp_path: Path) -> None:
    limited = ["prlimit", "--fsize=300000", sys.executable, TOOL, str(model), "out", "--to", "hf"]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("OSError: [Errno 27] File too large: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# A process inherits the peak of the one that started it: a small one starts it.
PEAK = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(used.ru_maxrss // 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_mib(folder: Path, *arguments: str | Path) -> int:
    """The largest resident set of the tool's process."""
    done = python(folder, "-c", PEAK, sys.executable, TOOL, *map(str, arguments))
    assert done.status == 0, done.err
    return int(done.out)


def test_memory_does_not_grow_with_the_model(model: Path, tmp_path: Path) -> None:
    names = {"vocab_size": 120_000, "hidden_size": 2048, "num_hidden_layers": 1}
    config = json.loads((model.parent / "llama" / "config.json").read_text()) | names
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(config | {"intermediate_size": 16_384}))
    shapes = checkpoint_map(load_model_config(tmp_path / "big")).hf_shapes()
    kinds = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(tmp_path / "big" / "model.safetensors", kinds) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
        assert writer.close().num_bytes > 1_100 * 2**20
    # 230 MiB are Python's and torch's, 470 the largest tensor's, which is never in memory as a whole.
    # Megatron's chunks are kept for a while, 128 MiB of them, and glibc keeps some of what was freed.
    full = ("--verify", "full", "--dtype", "float16")
    assert peak_mib(tmp_path, "big", "hf", "--to", "hf", *full) < 690
    assert peak_mib(tmp_path, "big", "megatron", "--to", "torch_dist", *full) < 880
    shutil.rmtree(tmp_path / "hf")
    assert peak_mib(tmp_path, "megatron", "hf", "--to", "hf", "--config", "big") < 880
    for name in ("big", "hf", "megatron"):
        shutil.rmtree(tmp_path / name)


# Protocol 0, written out by hand: os.mkdir("sung").
EVIL = b"cposix\nmkdir\n(Vsung\ntR."


@pytest.fixture(scope="module")
def megatron(world: World, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    done = convert(world, folder, model, "good", "--to", "torch_dist")
    assert done.status == 0, done.err
    return folder / "good"


def put_archive(path: Path) -> None:
    """An archive as ``torch.save`` writes it, with the pickle that makes a folder."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", EVIL)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_no_pickle_of_a_megatron_checkpoint_is_run(
    world: World, model: Path, megatron: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(megatron, tmp_path / "evil")
    path = tmp_path / "evil" / "release" / file
    if file == ".metadata":
        path.write_bytes(EVIL)
    elif file == "common.pt":
        put_archive(path)
    else:
        with path.open("r+b") as stream:
            for stored in read_index(path.parent).tensors.values():
                for _, stretch in stored.chunks:
                    stream.seek(stretch.offset)
                    stream.write(EVIL)
    done = convert(world, tmp_path, "evil", "out", "--to", "hf", "--config", model)
    assert done.status == 1
    assert done.err.startswith(f"ModelError: {path}"), done.err
    assert "names posix.mkdir" in done.err, done.err
    assert not list(tmp_path.rglob("sung")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["a bare pickle", "an archive"])
def test_no_pickle_with_the_name_of_safetensors_is_run(
    world: World, model: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(model, tmp_path / "evil")
    path = tmp_path / "evil" / "model.safetensors"
    path.unlink()
    path.write_bytes(EVIL) if content == "a bare pickle" else put_archive(path)
    for to in ("hf", "mtrl", "torch_dist"):
        done = convert(world, tmp_path, "evil", "out", "--to", to)
        assert done.status == 1
        assert done.err.startswith(f"ModelError: {path} is no whole safetensors file: "), done.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["evil"]


def test_folders_with_only_other_kinds_of_weights_are_not_read(
    world: World, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "evil").mkdir()
    shutil.copy(model / "config.json", tmp_path / "evil")
    put_archive(tmp_path / "evil" / "pytorch_model.bin")
    done = convert(world, tmp_path, "evil", "out", "--to", "hf")
    assert done.status == 1 and "holds neither model.safetensors nor" in done.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["evil"]


def test_the_checkpoint_of_a_run_goes_on_with_its_training_state(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    done = convert(
        world, tmp_path, checkpoint, checkpoint.name, "--to", "mtrl", "--with-optimizer", "--verify", "full"
    )
    assert done.status == 0, done.err
    target = tmp_path / checkpoint.name
    assert verify(target) == []
    for path in (checkpoint / "training").iterdir():
        assert (target / "training" / path.name).read_bytes() == path.read_bytes()


def test_the_checkpoint_of_a_run_opens_in_transformers_as_a_folder(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = convert(
        world, tmp_path, checkpoint, "out", "--to", "hf", "--dtype", "bfloat16", "--verify", "logits"
    )
    assert done.status == 0, done.err
    network, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert network.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = {n: t.bfloat16() for f in checkpoint.glob("*.safetensors") for n, t in load_file(f).items()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("1+1=")
    assert not (tmp_path / "out" / "training").exists()


def test_with_no_arguments_it_says_how_it_is_used(tmp_path: Path) -> None:
    assert tool(tmp_path).status == 2
    help_text = tool(tmp_path, "--help")
    assert help_text.status == 0 and "--verify {names,full,logits}" in help_text.out
