"""``rollout.dtype: fp8`` is refused before launch where it cannot be had; which weights it means."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mtrl.acceleration import check_acceleration, this_machine
from mtrl.config import Config
from mtrl.config_check import actor_spec
from mtrl.config_load import load_config
from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.parallel.errors import ConfigError, LayoutError, ModelError, RolloutError
from mtrl.parallel.spec import RolloutSpec, parse_rollout_spec
from mtrl.rollout.fp8_weights import check_sliced, fp8_names, quantization_config, with_scales
from mtrl.rollout.vllm_build import check_fp8
from tests.rollout.fp8_scenarios import ENGINES, TOYS, write_config
from tests.unit.test_family_configs import written

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
    if this_machine().machine.gpu is not None:
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
    with pytest.raises(LayoutError, match=r"192 of the 384 dims inside an expert.*expert_parallel=true"):
        check(config(tmp_path), model, able=True)
    check(config(tmp_path, "rollout.expert_parallel=true"), model, able=True)
    check(config(tmp_path, "rollout.backend=vllm:d2"), model, able=True)


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(written("gpt oss")))
    with pytest.raises(ModelError) as caught:
        check(config(tmp_path), load_model_config(tmp_path / "gpt"), able=True)
    assert str(caught.value).startswith("rollout.dtype: fp8: the experts of gpt_oss are fused")
    assert str(caught.value).endswith("write rollout.dtype=bf16")


# By model, sizes and engine: what is told of the size, and what to write besides rollout.dtype=bf16.
CUT: dict[str, tuple[str, dict[str, int], str, bool, str, str]] = {
    "gate and up of an MLP": ("llama", {"intermediate_size": 480}, "vllm:d2", False,
                              "all 480 dims inside an MLP", ""),
    "an MLP in slices": ("llama", {"intermediate_size": 896}, "vllm:t2", False,
                         "448 of the 896 dims inside an MLP", "rollout.backend=vllm:d2"),
    "a smaller slice": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 16}, "vllm:d2t16", False,
                        "64 of the 1024 dims of queries", "rollout.backend=vllm:d8t4"),
    "keys and values": ("qwen3", {"num_key_value_heads": 1}, "vllm:d2", False, "all 64 dims of keys", ""),
    "keys and values in slices": ("qwen3", {"num_key_value_heads": 2}, "vllm:t2", False,
                                  "64 of the 128 dims of keys", "rollout.backend=vllm:d2"),
    "keys and values that ranks share": ("qwen3 moe", {"num_key_value_heads": 1}, "vllm:t2", True,
                                         "all 64 dims of keys", ""),
    "queries": ("olmoe", {"num_attention_heads": 6, "num_key_value_heads": 2}, "vllm:t2", True,
                "192 of the 384 dims of queries", "rollout.backend=vllm:d2"),
    "hidden states": ("llama", {"hidden_size": 448}, "vllm:d2", False,
                      "all 448 dims of the hidden state", ""),
    "experts": ("mixtral", {"intermediate_size": 448}, "vllm:t2", True, "all 448 dims inside an expert", ""),
    "shared experts": ("qwen2 moe", {"shared_expert_intermediate_size": 192}, "vllm:d2", False,
                       "all 192 dims inside the shared expert", ""),
    "shared experts in slices": ("glm4 moe", {"moe_intermediate_size": 128}, "vllm:t2", True,
                                 "64 of the 128 dims inside the shared expert", "rollout.backend=vllm:d2"),
    "dense layers of a mixture": ("deepseek v3", {"intermediate_size": 480}, "vllm:d2", False,
                                  "all 480 dims inside an MLP", ""),
    "the query rank": ("deepseek v3", {"q_lora_rank": 192}, "vllm:d2", False,
                       "all 192 dims of the query rank", ""),
    "the KV rank": ("moonlight", {"kv_lora_rank": 448}, "vllm:d2", False,
                    "all 448 dims of the key and value rank", ""),
    "latent values": ("moonlight", {"v_head_dim": 24}, "vllm:t2", False,
                      "96 of the 192 dims of values", ""),
    "latent queries": ("deepseek v3", {"qk_nope_head_dim": 40, "v_head_dim": 64}, "vllm:t2", False,
                       "416 of the 832 dims of queries", "rollout.backend=vllm:d2"),
    "latent keys and values": ("deepseek v3", {"num_attention_heads": 2, "num_key_value_heads": 2,
                                               "v_head_dim": 128}, "vllm:t2", False,
                               "192 of the 384 dims of keys and values", "rollout.backend=vllm:d2"),
}  # fmt: skip


@pytest.mark.parametrize("case", CUT)
def test_sizes_whose_parts_are_no_whole_blocks_are_refused_with_the_fix(tmp_path: Path, case: str) -> None:
    toy, fields, engines, apart, told, instead = CUT[case]
    model = write_config(tmp_path / "model", toy, **fields)
    given = config(
        tmp_path, f"rollout.backend={engines}", f"rollout.expert_parallel={'true' if apart else 'false'}"
    )
    with pytest.raises(LayoutError) as caught:
        check(given, model, able=True)
    said = str(caught.value)
    assert said.startswith(f"rollout.dtype: fp8: a scale is of 128 x 128 weights, and {engines} gives each ")
    assert f"rank {told}" in said
    assert said.endswith(
        f"write {instead}, or rollout.dtype=bf16" if instead else "; write rollout.dtype=bf16"
    )
    if instead:  # what is told to be written is taken
        check_sliced(model, parse_rollout_spec(instead.partition("=")[2]), expert_parallel=apart)


@pytest.mark.parametrize(("tp", "expert_parallel"), ENGINES)
@pytest.mark.parametrize("toy", TOYS)
def test_sizes_of_whole_blocks_are_taken(tmp_path: Path, toy: str, tp: int, expert_parallel: bool) -> None:
    spec = RolloutSpec(backend="vllm", tp=tp)
    check_sliced(write_config(tmp_path, toy), spec, expert_parallel=expert_parallel)


def test_rows_that_come_last_may_end_within_a_block(tmp_path: Path) -> None:
    # As in DeepSeek-V3: 512 + 64 rows below those of queries; one rank's heads are of any size.
    model = write_config(tmp_path, "deepseek v3", qk_nope_head_dim=40, v_head_dim=64)
    check_sliced(model, RolloutSpec(backend="vllm"), expert_parallel=False)


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
