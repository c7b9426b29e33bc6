"""Folders in published formats pass the checks before a run, and others are refused there with the reason."""

import json
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from mtrl.parallel.errors import ModelError, WeightError
from tests.e2e.toy import MODEL
from tests.family_toys import write_quantized
from tests.unit.test_preflight import job_folder, prepared  # noqa: F401  the fixture is used by name

pytestmark = [pytest.mark.one_stack, pytest.mark.usefixtures("job_folder")]

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}
SETTINGS = ("model.init=null", "model.path=given")


def write_model(folder: Path, **options: object) -> Path:
    sizes = {key: value for key, value in MODEL.items() if key not in ("architectures", "model_type")}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).save_pretrained(folder, **options)
    return folder


def test_fused_experts_pass() -> None:
    folder = write_model(Path("given"), save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(folder / "model.safetensors"))
    assert prepared(*SETTINGS, name="sft").model.family == "qwen3_moe"


def test_many_files_pass() -> None:
    folder = write_model(Path("given"), max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert prepared(*SETTINGS, name="sft").model.family == "qwen3_moe"


def test_fp8_blocks_pass_and_another_quantisation_does_not() -> None:
    folder, _ = write_quantized(write_model(Path("plain")), Path("given"), FP8)
    assert prepared(*SETTINGS, name="sft").model.family == "qwen3_moe"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"not read, the first is .*quant_method 'awq' in config.json"):
        prepared(*SETTINGS, name="sft")


def test_a_missing_expert_of_an_fp8_folder_is_named() -> None:
    folder, _ = write_quantized(write_model(Path("plain")), Path("given"), FP8)
    tensors = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    for name in (gone, gone + "_scale_inv"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=rf"missing: {gone} \(48, 64\)"):
        prepared(*SETTINGS, name="sft")


def test_a_head_size_that_the_engine_would_not_read_is_refused() -> None:
    sizes = {key: value for key, value in MODEL.items() if key not in ("architectures", "model_type")}
    config = transformers.Qwen2Config(**{**sizes, "head_dim": 2 * sizes["hidden_size"] // 4})
    transformers.Qwen2ForCausalLM(config).save_pretrained("given")
    dense = (*SETTINGS, "actor.backend=megatron:d2")
    assert prepared(*dense, name="sft").model.head_dim == config.head_dim
    with pytest.raises(ModelError, match=r"vLLM takes hidden_size / num_attention_heads = \d+ .*sft only"):
        prepared(*dense, name="grpo")
