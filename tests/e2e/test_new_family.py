"""docs/new_family.md, run: its files are written as they stand there, its commands run in their order."""

import importlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.world import World, WorldError
from tests.e2e.jobs import ROOT
from tests.e2e.toy import MODEL

pytestmark = pytest.mark.one_stack

TEXT = (ROOT / "docs" / "new_family.md").read_text()
SFT = """\
output_dir: runs/sft
algorithm: {name: sft, total_steps: 2, samples_per_step: 3, max_tokens_per_microbatch: 64}
model: {path: my-mistral, tokenizer: tokenizer, precision: fp32}
actor: {backend: "megatron:t2", optimizer: {lr: 1.0e-3}}
data: {train: sft.jsonl}
logging: {progress: none}
"""


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [body for each, body in found if each == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """The reader's folder: the files of the document, a model that transformers wrote, and data."""
    import transformers

    folder = tmp_path_factory.mktemp("family")
    names = re.findall(r"`(\w+\.py)`[^`]*(?:`mtrl/train.py`)?:$|^`(check_\w+\.py)`", TEXT, flags=re.MULTILINE)
    files = ["mistral_family.py", "check_mistral.py", "train_mistral.py"]
    assert [first or second for first, second in names] == files
    for name, text in zip(files, blocks("python"), strict=True):
        (folder / name).write_text(text)
    sizes = {key: value for key, value in MODEL.items() if key not in ("architectures", "model_type")}
    torch.manual_seed(0)
    config = transformers.MistralConfig(**sizes, sliding_window=None)
    transformers.MistralForCausalLM(config).save_pretrained(folder / "my-mistral")
    (folder / "sft.yaml").write_text(SFT)
    shutil.copyfile(toy / "task" / "sft.jsonl", folder / "sft.jsonl")
    shutil.copytree(toy / "task" / "tokenizer", folder / "tokenizer")
    return folder


def run_script(folder: str, script: str, arguments: list[str]) -> dict[str, int]:
    """What a rank runs in place of ``torchrun SCRIPT ARGUMENTS``; its paths are relative to ``folder``."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    module = importlib.import_module(script)
    if script.startswith("train"):
        return {"status": module.main(arguments)}
    given, spec, out = arguments
    return {"status": module.main(Path(given), spec, Path(out))}


def run(world: World, folder: Path, command: str) -> None:
    torchrun, flag, size, script, *arguments = shlex.split(command)
    assert [torchrun, flag] == ["torchrun", "--nproc-per-node"]
    request = {"folder": str(folder), "script": script.removesuffix(".py"), "arguments": arguments}
    ranks = world.run(run_script, request, size=int(size), start=False, timeout_s=200)
    assert [rank["status"] for rank in ranks] == [0] * int(size), command


def test_the_document_adds_a_family_that_computes_what_transformers_does_and_trains(
    world: World, folder: Path
) -> None:
    commands = [line for block in blocks("") for line in block.splitlines()]
    assert [command.split()[3] for command in commands] == ["check_mistral.py"] * 2 + ["train_mistral.py"] * 2
    for command in commands:
        run(world, folder, command)
    steps = (folder / "runs" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(step)["step"] for step in steps] == [1, 2]


def test_the_documents_other_format_is_read_and_the_published_one_written(world: World, folder: Path) -> None:
    source = folder / "my-mistral"
    shutil.copytree(source, folder / "my-fused")
    tensors: dict[str, Any] = load_file(source / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.mlp."
        parts = [tensors.pop(f"{at}{name}_proj.weight") for name in ("gate", "up")]
        tensors[at + "gate_up_proj.weight"] = torch.cat(parts)
    save_file(tensors, folder / "my-fused" / "model.safetensors", metadata={"format": "pt"})
    for size, spec in ((1, "megatron:d1"), (2, "megatron:t2")):
        run_request = {"folder": str(folder), "spec": spec, "out": f"unfused-{size}"}
        world.run(load_fused, run_request, size=size)
        found = load_file(folder / f"unfused-{size}" / "model.safetensors")
        expected = load_file(source / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def load_fused(folder: str, spec: str, out: str) -> None:
    """Read the fused folder with the document's family, and write it."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import export_hf, load_hf
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    sys.path.insert(0, folder)
    importlib.import_module("mistral_family")
    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(spec)))
    parallel_groups.seed_everything(1, groups)
    model = build_model(load_model_config(Path(folder) / "my-fused"), groups)
    load_hf(model, Path(folder) / "my-fused")
    export_hf(model, Path(folder) / out)


def test_the_documents_family_refuses_what_it_does_not_compute(world: World, folder: Path) -> None:
    """A key left out means a window here, as it does in transformers."""
    shutil.copytree(folder / "my-mistral", folder / "windowed")
    config = json.loads((folder / "windowed" / "config.json").read_text())
    del config["sliding_window"]
    (folder / "windowed" / "config.json").write_text(json.dumps(config))
    command = "torchrun --nproc-per-node 1 check_mistral.py windowed megatron:d1 never"
    with pytest.raises(WorldError, match="Mistral with sliding_window 4096 is not supported; only None"):
        run(world, folder, command)
