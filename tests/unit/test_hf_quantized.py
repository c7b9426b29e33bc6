"""Folders of fp8 blocks read as their bf16 weights: exactly, and only the boxes that are asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtrl.models.boxes import Box
from mtrl.models.families import load_model_config
from mtrl.models.hf_folder import SCALE_SUFFIX, Blocks, check_names, folder_shapes, quantized_blocks
from mtrl.models.quantized import DequantizedSource, open_folder
from mtrl.parallel.errors import ModelError
from tests.family_toys import build_family_toy, quantize, save, write_quantized
from tests.unit.test_family_tables import weight_map

pytestmark = pytest.mark.one_stack

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


class Memory:
    """A source of tensors in memory that notes what is read of it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.num_read = tensors, 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, box: Box) -> Tensor:
        self.num_read += box.num_elements
        return self.tensors[name][box.slices]


def plainly(weight: Tensor, scales: Tensor, size: int) -> Tensor:
    """Dequantise by the definition, block by block."""
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    for row in range(scales.shape[-2]):
        for column in range(scales.shape[-1]):
            at = (..., slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
            scale = scales[..., row, column][..., None, None]
            result[at] = (weight[at].to(torch.float32) * scale).to(torch.bfloat16)
    return result


def part_of(extent: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(0, extent - 1).flatmap(
        lambda low: st.tuples(st.just(low), st.integers(low + 1, extent))
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_box_is_that_box_of_the_whole_dequantised_tensor(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 4, 7]), "block")
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=3), "shape"))
    box = Box(tuple(data.draw(part_of(extent), "range") for extent in shape))
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    weight, scales = quantize(torch.randn(shape), size)
    source = Memory({"w": weight, "w" + SCALE_SUFFIX: scales})
    read = DequantizedSource(source, Blocks(rows=size, columns=size)).read("w", box)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, plainly(weight, scales, size)[box.slices])
    blocks = [(-(-high // size) - low // size) for low, high in box.ranges[-2:]]
    outer = [high - low for low, high in box.ranges[:-2]]
    assert source.num_read == box.num_elements + torch.Size([*outer, *blocks]).numel()


def test_dequantising_gives_what_transformers_gives() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    weight, scales = quantize(torch.randn(256, 384), 128)
    source = DequantizedSource(Memory({"w": weight, "w_scale_inv": scales}), Blocks(rows=128, columns=128))
    expected = Fp8Dequantize(None).convert(
        {"weight$": [weight], "weight_scale_inv": [scales]}, full_layer_name="w"
    )["w"]
    assert torch.equal(source.read("w", Box.full((256, 384))), expected.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["deepseek v3", "glm4 moe", "llama"])
def test_a_quantised_folder_has_the_names_and_shapes_of_one_that_is_not(name: str, tmp_path: Path) -> None:
    plain = save(build_family_toy(name).bfloat16(), tmp_path / "plain")
    quantized, dequantized = write_quantized(plain, tmp_path / "fp8", FP8)
    assert folder_shapes(quantized) == folder_shapes(plain)
    config = load_model_config(quantized)
    check_names(config, weight_map(config).hf_shapes(), folder_shapes(quantized))
    with open_folder(quantized) as source:
        assert source.shapes() == folder_shapes(plain)
        for key, tensor in dequantized.items():
            read = source.read(key, Box.full(tensor.shape))
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), key
    assert any(key.endswith(SCALE_SUFFIX) for key in load_file(quantized / "model.safetensors"))


def test_a_folder_that_says_fp8_and_holds_none_is_read_as_it_is(tmp_path: Path) -> None:
    plain = save(build_family_toy("llama"), tmp_path)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    assert quantized_blocks(plain) == Blocks(rows=16, columns=16)
    with open_folder(plain) as source:
        for key, tensor in load_file(plain / "model.safetensors").items():
            assert torch.equal(source.read(key, Box.full(tensor.shape)), tensor)


NORM = "model.norm.weight"
Change = dict[str, Tensor | None]
REFUSED: dict[str, tuple[dict[str, Any], Change, str]] = {
    "no blocks named": (
        FP8 | {"weight_block_size": None},
        {},
        "in a format that is not read, the first is model.layers.0.",
    ),
    "another grid": (FP8 | {"weight_block_size": [8, 8]}, {}, "(F8_E4M3); quant_method 'fp8' in config.json"),
    "no scales": (FP8, {"model.layers.0.mlp.up_proj.weight_scale_inv": None}, "mlp.up_proj.weight (F8_E4M3)"),
    "scales of bytes": (
        FP8,
        {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(5, 3, dtype=torch.uint8)},
        "has 1 tensors in a format that is not read",
    ),
    "integers": (
        {"quant_method": "gptq", "bits": 4},
        {NORM: torch.ones(48, dtype=torch.int32)},
        "model.norm.weight (I32); quant_method 'gptq' in config.json",
    ),
    "microscaling": (
        {"quant_method": "mxfp4"},
        {NORM: torch.ones(48, dtype=torch.uint8)},
        "bf16, which transformers writes with Mxfp4Config(dequantize=True) and save_pretrained",
    ),
    "another fp8": (
        {"quant_method": "compressed-tensors"},
        {NORM: torch.ones(48).to(torch.float8_e5m2)},
        "give a folder of the same model in bf16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_quantised_in_another_way_is_refused_with_what_to_do(case: str, tmp_path: Path) -> None:
    quantization, changes, message = REFUSED[case]
    folder, _ = write_quantized(save(build_family_toy("llama"), tmp_path / "plain"), tmp_path / "fp8", FP8)
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ModelError) as raised:
        folder_shapes(folder)
    assert message in str(raised.value), str(raised.value)
