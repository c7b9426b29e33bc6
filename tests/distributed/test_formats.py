"""Folders in the formats that models are published in: read exactly and written back, under any layout.

What is written is the folder's own tensors, bit by bit and in their dtypes; of a quantised folder, its
weights dequantised in bf16. Folders are in bf16 with selection biases in float32, as published ones are.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import build_family_toy, prediction_layer, save, write_quantized

pytestmark = pytest.mark.one_stack

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
SHARD_BYTES = 150_000
LAYOUTS = {
    1: ["megatron:d1"],
    2: ["megatron:(attn:t2|ffn:e2)", "megatron:(attn:p2|ffn:e1)"],
    4: ["megatron:(attn:p2t2|ffn:t2)", "megatron:(attn:d4|ffn:t2e2)"],
}
CARRIED = "model.layers.4."  # the toys have four layers


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_sharded(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Spread tensors over three files so that those of a layer are in different ones."""
    folder.mkdir(parents=True)
    where = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def write_carrying(folder: Path, toy: str) -> None:
    """A toy with a multi-token prediction layer, sharded."""
    plain = save(build_family_toy(toy).bfloat16(), folder.with_name(folder.name + " without"))
    tensors = read_folder(plain)
    biases = {name: t.float() for name, t in tensors.items() if "e_score_correction_bias" in name}
    tensors |= biases
    config = json.loads((plain / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    config.pop("num_mtp_layers", None)
    write_sharded(folder, tensors | prediction_layer(tensors, 4), config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that is read. Beside it, ``expected/NAME``: the tensors that are to be written."""
    root = tmp_path_factory.mktemp("formats")
    write_carrying(root / "deepseek", "deepseek v3")
    write_carrying(root / "glm", "glm4 moe")
    merged = root / "merged"
    merged.mkdir()
    save_file(read_folder(root / "deepseek"), merged / "model.safetensors")
    (merged / "config.json").write_text((root / "deepseek" / "config.json").read_text())
    _, weights = write_quantized(merged, root / "fp8", FP8)
    save(build_family_toy("mixtral").bfloat16(), root / "mixtral", max_shard_size="100KB")
    fused = root / "mixtral fused"
    save(build_family_toy("mixtral").bfloat16(), fused, save_original_format=False, max_shard_size="200KB")
    expected = {name: read_folder(root / name) for name in ("deepseek", "glm", "mixtral")}
    for name, tensors in {**expected, "fp8": weights, "mixtral fused": expected["mixtral"]}.items():
        (root / "expected" / name).mkdir(parents=True)
        save_file(tensors, root / "expected" / name / "model.safetensors")
    return {name: root / name for name in ("deepseek", "glm", "fp8", "mixtral", "mixtral fused")}


def load_and_export(folders: dict[str, str], out: str, specs: list[str]) -> dict[str, Any]:
    """Export each folder in bf16, in float32, and from its export; returns what is carried by this rank."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import export_hf, load_hf

    found = {}
    cases = [[spec, 1, name, f"{spec} {name}"] for spec in specs for name in folders]
    for groups, _, toy, name in each_case(cases):
        model = build_model(load_model_config(Path(folders[toy])), groups, precision="bf16")
        load_hf(model, Path(folders[toy]))
        target = Path(out) / name
        export_hf(model, target / "bf16")
        export_hf(model, target / "sharded", shard_bytes=SHARD_BYTES)
        export_hf(model, target / "float32", dtype=torch.float32)
        found[name] = {"carried": sorted(model.carried.tensors)}
        again = build_model(load_model_config(target / "sharded"), groups, precision="bf16")
        load_hf(again, target / "sharded")
        export_hf(again, target / "again")
    return found


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_tensor_is_written_as_it_was_read(
    size: int, world: World, folders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = {
        "folders": {k: str(v) for k, v in folders.items()},
        "out": str(tmp_path),
        "specs": LAYOUTS[size],
    }
    ranks = world.run(load_and_export, arguments, size=size)
    for spec in LAYOUTS[size]:
        for name, source in folders.items():
            expected = load_file(source.parent / "expected" / name / "model.safetensors")
            for written in ("bf16", "sharded", "again"):
                check_equal(read_folder(tmp_path / f"{spec} {name}" / written), expected)
            widened = read_folder(tmp_path / f"{spec} {name}" / "float32")
            trained = {key: t for key, t in expected.items() if not key.startswith(CARRIED)}
            check_equal(widened, expected | {key: tensor.float() for key, tensor in trained.items()})
            check_index(tmp_path / f"{spec} {name}" / "sharded")
            check_config(tmp_path / f"{spec} {name}" / "bf16", source)
            held = [name for rank in ranks for name in rank[f"{spec} {source.name}"]["carried"]]
            assert sorted(held) == sorted(key for key in expected if key.startswith(CARRIED))


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def check_index(folder: Path) -> None:
    """The index names every file's tensors and counts their bytes; no file of several is over the limit."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    num_bytes = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert {name: index["weight_map"][name] for name in tensors} == dict.fromkeys(tensors, file.name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= SHARD_BYTES or len(tensors) == 1
        num_bytes += size
    assert index["metadata"]["total_size"] == num_bytes


def check_config(folder: Path, source: Path) -> None:
    """The config is the source's, in the dtype that was written, and quantises nothing."""
    before = json.loads((source / "config.json").read_text())
    after = json.loads((folder / "config.json").read_text())
    before.pop("quantization_config", None)
    assert after == before | {"dtype": "bfloat16"}


def refuse_and_refill(folders: dict[str, str], wrong: str) -> dict[str, Any]:
    """What a model carries after a folder that is refused, after one with nothing to carry, and at first."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import initialize, load_hf
    from mtrl.parallel.errors import WeightError

    for groups, *_ in each_case([["megatron:d2", 1, "", ""]]):
        model = build_model(load_model_config(Path(folders["glm"])), groups)
        initialize(model, seed=1)
        sizes = [len(model.carried.tensors)]
        load_hf(model, Path(folders["glm"]))
        sizes.append(len(model.carried.tensors))
        with pytest.raises(WeightError, match=r"unknown: model\.layers\.5\.embed_tokens\.weight"):
            load_hf(model, Path(wrong))
        sizes.append(len(model.carried.tensors))
        load_hf(model, Path(folders["glm"] + " without"))
        sizes.append(len(model.carried.tensors))
    return {"sizes": sizes}


def test_a_layer_too_many_is_refused_and_what_was_carried_stays(
    world: World, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_folder(folders["glm"])
    further = {name.replace("layers.4.", "layers.5."): t for name, t in prediction_layer(tensors, 4).items()}
    config = json.loads((folders["glm"] / "config.json").read_text())
    write_sharded(tmp_path / "wrong", tensors | further, config)
    arguments = {"folders": {k: str(v) for k, v in folders.items()}, "wrong": str(tmp_path / "wrong")}
    for rank in world.run(refuse_and_refill, arguments, size=2):
        first, carried, refused, without = rank["sizes"]
        assert (first, without) == (0, 0) and carried == refused > 0
