"""``rollout.dtype: fp8`` is refused before launch where it cannot be had; which weights it means."""

from dataclasses import replace
from pathlib import Path

import pytest

from mtrl.acceleration import check_acceleration, this_machine
from mtrl.config import Config
from mtrl.config_check import actor_spec
from mtrl.config_load import load_config
from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.parallel.capabilities import Machine
from mtrl.parallel.errors import ConfigError, LayoutError, ModelError, RolloutError
from mtrl.parallel.spec import RolloutSpec
from mtrl.rollout.fp8_weights import fp8_names, quantization_config, with_scales
from mtrl.rollout.vllm_build import check_fp8
from tests.rollout.fp8_scenarios import write_config

FILE = """
output_dir: out
algorithm: {name: grpo, total_steps: 2, prompts_per_step: 2, max_tokens_per_microbatch: 64}
model: {init: model}
actor: {backend: "megatron:d2", optimizer: {lr: 1.0e-3}}
rollout: {backend: "vllm:t2", dtype: fp8}
reward: {name: "exact_match"}
data: {train: train.jsonl}
"""


def config(folder: Path, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(FILE)
    return load_config(path, overrides)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return write_config(tmp_path / "model", "qwen3 moe")


def check(given: Config, model: ModelConfig, *, able: bool) -> None:
    here = this_machine()
    found = replace(here, features=here.features | {"fp8_rollout": ""}) if able else here
    check_acceleration(given, actor_spec(given), model, lambda: found)


def test_without_a_gpu_it_is_refused_with_the_reason(tmp_path: Path, model: ModelConfig) -> None:
    if this_machine().machine != Machine(gpu=None, sm=None, cuda=None):
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ConfigError) as caught:
        check(config(tmp_path), model, able=False)
    told = str(caught.value)
    assert told.startswith("rollout.dtype: fp8, which cannot be had here: ")
    assert "vllm: not installed" in told or "needs a GPU with sm_89 or newer, found none" in told
    assert told.endswith("write rollout.dtype=bf16")
    with pytest.raises(RolloutError, match="FP8 rollout weights need a GPU"):
        check_fp8(tmp_path / "model", RolloutSpec(backend="vllm"), expert_parallel=False)


def test_where_it_can_be_had_it_is_taken(tmp_path: Path, model: ModelConfig) -> None:
    check(config(tmp_path), model, able=True)
    check(config(tmp_path, "rollout.dtype=bf16"), model, able=False)


def test_experts_sliced_within_blocks_are_refused(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", "qwen3 moe", moe_intermediate_size=384)
    with pytest.raises(LayoutError, match=r"each rank 192 of the 384 of an expert.*expert_parallel=true"):
        check(config(tmp_path), model, able=True)
    check(config(tmp_path, "rollout.expert_parallel=true"), model, able=True)
    check(config(tmp_path, "rollout.backend=vllm:d2"), model, able=True)


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    from tests.unit.test_family_configs import written

    (tmp_path / "gpt").mkdir()
    import json

    (tmp_path / "gpt" / "config.json").write_text(json.dumps(written("gpt oss")))
    with pytest.raises(ModelError, match="gpt_oss: its experts' fused weights cannot be sampled with in FP8"):
        check(config(tmp_path), load_model_config(tmp_path / "gpt"), able=True)


def test_layers_linears_are_in_fp8_and_the_rest_is_named_for_vllm(model: ModelConfig) -> None:
    names = fp8_names(model)
    assert len(names) == len(set(names)) == 2 * (4 + 3 * 8)
    told = quantization_config(model)
    assert told["weight_block_size"] == [128, 128] and told["quant_method"] == "fp8"
    assert told["modules_to_not_convert"] == [
        "model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
    ]  # fmt: skip
    shapes = with_scales({"a": (130, 256), "b": (4,)}, ("a",))
    assert shapes == {"a": (130, 256), "b": (4,), "a_scale_inv": (2, 2)}
