"""What the tests of conversions share: toys as they are published, and what a conversion left."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtrl.checkpoint.convert_plan import JOURNAL, Request
from mtrl.tools.convert_checkpoint import main
from tests.family_toys import build_family_toy, save

SMALL_GB = 20_000 / 2**30
FIXED = "e_score_correction_bias"
"""What families keep in float32."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def run(source: Path, target: Path, to: str, *options: str) -> None:
    assert main([str(source), str(target), "--to", to, "--verify", "full", *options]) == 0


def check_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_clean(target: Path) -> None:
    """A finished folder has nothing of its making in it or beside it."""
    assert JOURNAL not in names_in(target)
    assert not target.with_name(target.name + ".partial").exists()


def write_toys(root: Path, *toys: str) -> Path:
    """Toys in bf16, with selection biases in float32, as they are published."""
    for toy in toys:
        save(build_family_toy(toy, seed=2).bfloat16(), root / "plain" / toy)
        tensors = {n: t.float() if FIXED in n else t for n, t in tensors_of(root / "plain" / toy).items()}
        write_folder(root / toy, tensors, config_of(root / "plain" / toy))
        (root / toy / "tokenizer.json").write_text('{"version": "1.0"}')
        (root / toy / "merges.txt").write_text("a b\n")
    return root


def request(source: Path, target: Path, **more: Any) -> Request:
    return Request(**{"source": source, "target": target, "to": "hf", "shard_bytes": 20_000, **more})


def ignore(_: int) -> None: ...


def flip(file: Path) -> None:
    """Turn a bit of a file's last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def journal(target: Path) -> list[str]:
    return (target.with_name(target.name + ".partial") / JOURNAL).read_text().splitlines()
