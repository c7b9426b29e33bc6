"""Conversions both ways give the same bits, in every format that families are published in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtrl.checkpoint import convert as convert_module
from mtrl.checkpoint.load import verify
from tests.family_toys import FAMILY_TOYS, build_family_toy, prediction_layer, save, write_quantized
from tests.unit.convert_toys import (
    FIXED,
    SMALL_GB,
    check_clean,
    check_same,
    config_of,
    names_in,
    run,
    tensors_of,
    write_folder,
    write_toys,
)

pytestmark = pytest.mark.one_stack


TO_MEGATRON = [toy for toy in FAMILY_TOYS if toy != "olmoe"]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}


def with_mtp(source: Path, folder: Path) -> Path:
    """The folder with a multi-token prediction layer, whose fixed dtypes are the model's."""
    tensors = tensors_of(source)
    config = config_of(source) | {"num_nextn_predict_layers": 1}
    config.pop("num_mtp_layers", None)
    return write_folder(folder, tensors | prediction_layer(tensors, 4), config)


@pytest.fixture(autouse=True)
def nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a mapped file count as the process's memory: everything is read in rows instead."""
    monkeypatch.setattr("mtrl.models.sources.safe_open", None)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(tmp_path_factory.mktemp("toys"), *FAMILY_TOYS)


@pytest.mark.parametrize("toy", FAMILY_TOYS)
def test_to_an_mtrl_checkpoint_and_back_is_bit_identical(toys: Path, tmp_path: Path, toy: str) -> None:
    checkpoint, back = tmp_path / "step_000000", tmp_path / "back"
    run(toys / toy, checkpoint, "mtrl")
    run(checkpoint, back, "hf")
    assert verify(checkpoint) == []
    for folder in (checkpoint, back):
        check_same(folder, tensors_of(toys / toy))
        check_clean(folder)
        assert config_of(folder) == config_of(toys / toy)
    assert names_in(back) == names_in(toys / toy)
    assert (back / "tokenizer.json").read_bytes() == (toys / toy / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("toy", TO_MEGATRON)
def test_to_torch_dist_and_back_is_bit_identical(toys: Path, tmp_path: Path, toy: str) -> None:
    run(toys / toy, tmp_path / "megatron", "torch_dist")
    check_clean(tmp_path / "megatron")
    run(tmp_path / "megatron", tmp_path / "back", "hf", "--config", str(toys / toy))
    check_same(tmp_path / "back", tensors_of(toys / toy))
    assert config_of(tmp_path / "back") == config_of(toys / toy)
    assert (tmp_path / "back" / "merges.txt").read_text() == "a b\n"
    run(tmp_path / "megatron" / "release", tmp_path / "again", "torch_dist", "--config", str(toys / toy))
    run(tmp_path / "again", tmp_path / "step_000000", "mtrl", "--config", str(toys / toy))
    check_same(tmp_path / "step_000000", tensors_of(toys / toy))


@pytest.mark.parametrize("toy", ["mixtral", "qwen3 moe", "deepseek v3", "gpt oss"])
def test_small_files_and_small_parts_change_nothing(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: str
) -> None:
    monkeypatch.setattr(convert_module, "PART_BYTES", 1000)
    monkeypatch.setattr("mtrl.checkpoint.megatron_write.CHUNK_BYTES", 5000)
    monkeypatch.setattr("mtrl.checkpoint.megatron_write.FILE_BYTES", 30_000)
    monkeypatch.setattr("mtrl.checkpoint.megatron_weights.CACHE_BYTES", 6000)
    expected = tensors_of(toys / toy)
    run(toys / toy, tmp_path / "small", "hf", "--shard-gb", str(SMALL_GB))
    files = sorted(tmp_path.glob("small/*.safetensors"))
    count = len(files)
    assert count > 10 and files[0].name == f"model-00001-of-{count:05d}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= 20_000
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in expected.values())
    run(tmp_path / "small", tmp_path / "megatron", "torch_dist")
    run(tmp_path / "megatron", tmp_path / "one", "hf", "--config", str(toys / toy))
    check_same(tmp_path / "small", expected)
    check_same(tmp_path / "one", expected)


@pytest.mark.parametrize("toy", ["mixtral", "qwen2 moe", "qwen3 moe"])
def test_fused_experts_keep_their_form_in_folders_and_get_the_published_one_from_torch_dist(
    toys: Path, tmp_path: Path, toy: str
) -> None:
    model = build_family_toy(toy, seed=2).bfloat16()
    fused = save(model, tmp_path / "fused", save_original_format=False, max_shard_size="100KB")
    assert tensors_of(fused).keys() != tensors_of(toys / toy).keys()
    run(fused, tmp_path / "step_000000", "mtrl")
    check_same(tmp_path / "step_000000", tensors_of(fused))
    run(fused, tmp_path / "megatron", "torch_dist")
    run(tmp_path / "megatron", tmp_path / "back", "hf", "--config", str(fused))
    check_same(tmp_path / "back", tensors_of(toys / toy))


def test_the_copy_of_a_tied_embedding_stays_in_folders_and_has_no_place_in_torch_dist(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensors_of(toys / "qwen2 tied")
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    source = write_folder(tmp_path / "source", tensors | more, config_of(toys / "qwen2 tied"))
    run(source, tmp_path / "hf", "hf")
    check_same(tmp_path / "hf", tensors | more)
    assert "left out" not in capsys.readouterr().out
    run(source, tmp_path / "megatron", "torch_dist")
    assert "note: lm_head.weight is left out: config.json ties it" in capsys.readouterr().out
    run(tmp_path / "megatron", tmp_path / "back", "hf", "--config", str(source))
    check_same(tmp_path / "back", tensors)


@pytest.mark.parametrize("toy", ["deepseek v3", "glm4 moe"])
def test_prediction_layers_stay_in_folders_and_are_left_out_of_torch_dist_with_a_note(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: str
) -> None:
    source = with_mtp(toys / toy, tmp_path / "source")
    run(source, tmp_path / "step_000000", "mtrl")
    run(tmp_path / "step_000000", tmp_path / "hf", "hf")
    check_same(tmp_path / "hf", tensors_of(source))
    assert "left out" not in capsys.readouterr().out
    run(source, tmp_path / "megatron", "torch_dist")
    count = len(tensors_of(source)) - len(tensors_of(toys / toy))
    assert f"note: {count} tensors of multi-token prediction layers are left out" in capsys.readouterr().out
    run(tmp_path / "megatron", tmp_path / "back", "hf", "--config", str(source))
    check_same(tmp_path / "back", tensors_of(toys / toy))


def test_fp8_blocks_become_the_bf16_that_they_stand_for(toys: Path, tmp_path: Path) -> None:
    plain = with_mtp(toys / "deepseek v3", tmp_path / "plain")
    source, expected = write_quantized(plain, tmp_path / "fp8", FP8)
    run(source, tmp_path / "hf", "hf", "--shard-gb", str(SMALL_GB))
    check_same(tmp_path / "hf", expected)
    without = {key: value for key, value in config_of(source).items() if key != "quantization_config"}
    assert config_of(tmp_path / "hf") == without | {"dtype": "bfloat16"}
    run(source, tmp_path / "megatron", "torch_dist")
    # The config of a quantised folder says nothing of what comes out of Megatron's.
    run(tmp_path / "megatron", tmp_path / "back", "hf", "--config", str(source))
    check_same(tmp_path / "back", {n: t for n, t in expected.items() if not n.startswith("model.layers.4.")})
    assert config_of(tmp_path / "back") == without | {"dtype": "bfloat16"}


@pytest.mark.parametrize("to", ["hf", "mtrl", "torch_dist"])
def test_a_cast_leaves_what_the_family_fixes(toys: Path, tmp_path: Path, to: str) -> None:
    source = with_mtp(toys / "deepseek v3", tmp_path / "source")
    expected = {n: t if FIXED in n else t.half() for n, t in tensors_of(source).items()}
    assert {t.dtype for t in expected.values()} == {torch.float16, torch.float32}
    out = tmp_path / "out"
    run(source, out, to, "--dtype", "float16")
    if to == "torch_dist":
        run(out, tmp_path / "back", "hf", "--config", str(source))
        out = tmp_path / "back"
        expected = {n: t for n, t in expected.items() if not n.startswith("model.layers.4.")}
    check_same(out, expected)
    assert config_of(out) == config_of(source) | {"dtype": "float16"}


def test_widened_and_narrowed_again_is_what_it_was(toys: Path, tmp_path: Path) -> None:
    run(toys / "qwen3", tmp_path / "wide", "hf", "--dtype", "float32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "wide").values()} == {torch.float32}
    run(tmp_path / "wide", tmp_path / "narrow", "hf", "--dtype", "bfloat16")
    check_same(tmp_path / "narrow", tensors_of(toys / "qwen3"))
