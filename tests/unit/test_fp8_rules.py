"""Ways of FP8 that cannot be are refused before anything starts; see test_acceleration.py for the others."""

from pathlib import Path

import pytest

from mtrl.acceleration import check_acceleration
from mtrl.config_check import actor_spec
from mtrl.config_load import load_config
from mtrl.model_settings import fp8_of
from mtrl.parallel.errors import ConfigError
from tests.unit.test_acceleration import TE, WIDE, able, config, config_of

BLOCKS, KEPT = "model.precision=fp8_blockwise", "model.fp8.parameters=true"
RULES: dict[str, tuple[list[str], str]] = {
    "plain torch": ([BLOCKS, KEPT], "true with torch_native, whose parameters are bf16; write model.backend"),
    "delayed": ([TE, "model.precision=fp8_delayed", KEPT], "fp8_delayed, whose scales of weights come from"),
    "mxfp8": ([TE, "model.precision=mxfp8", KEPT], "mxfp8, whose parameters Megatron-Core gathers in bf16"),
    "whole optimizer": (
        [TE, BLOCKS, KEPT, "actor.optimizer.distributed=false"],
        "true without the distributed optimizer",
    ),
    "masters on the host": (
        [TE, BLOCKS, KEPT, "actor.optimizer.offload_fraction=0.5"],
        "true with actor.optimizer.offload_fraction, which keeps other masters",
    ),
    "without fp8": ([TE, KEPT], "model.fp8: given with model.precision bf16, which has no FP8"),
    "recomputed norms": (
        [
            TE,
            "model.precision=fp8_delayed",
            "actor.recompute=selective",
            "actor.recompute_modules=[layernorm]",
        ],
        "actor.recompute_modules: given layernorm with model.precision fp8_delayed",
    ),
}
RL = """
output_dir: out
algorithm: {name: grpo, total_steps: 2, prompts_per_step: 2, max_tokens_per_microbatch: 64}
model: {init: model}
actor: {backend: "megatron:d2", optimizer: {lr: 1.0e-3}}
rollout: {backend: "vllm:d2"}
reward: {name: "exact_match"}
data: {train: train.jsonl}
"""


@pytest.mark.parametrize("case", RULES)
def test_what_no_machine_can_do_in_fp8_is_refused(tmp_path: Path, case: str) -> None:
    overrides, message = RULES[case]
    given = config(tmp_path, *overrides)
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), config_of("glm4 moe"), able)
    assert message in str(caught.value)


NARROW: dict[str, tuple[dict[str, int], str, str, str]] = {
    "hidden": ({"hidden_size": 72}, "d2", "fp8_blockwise", "hidden_size is 72, but products in FP8 take"),
    "mlp": ({"intermediate_size": 48}, "t2", "fp8_delayed", "is 24 on each of 2 ranks of attn.tp"),
    "experts": ({"moe_intermediate_size": 48}, "(attn:d2|ffn:t2)", "fp8_blockwise", "width is 24 on each of"),
    "mxfp8": ({"moe_intermediate_size": 48}, "d2", "mxfp8", "48, but products in FP8 take multiples of 32"),
    "heads": ({"head_dim": 8}, "t2", "mxfp8", "width of all heads is 16 on each of 2"),
}


@pytest.mark.parametrize("case", NARROW)
def test_widths_that_products_in_fp8_do_not_take_are_refused(tmp_path: Path, case: str) -> None:
    sizes, layout, precision, message = NARROW[case]
    given = config(tmp_path, TE, f"model.precision={precision}", f"actor.backend=megatron:{layout}")
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), config_of("glm4 moe", **WIDE | sizes), able)
    assert message in str(caught.value)
    check_acceleration(given, actor_spec(given), config_of("glm4 moe", **WIDE), able)


def test_latent_attention_has_widths_of_its_own(tmp_path: Path) -> None:
    given = config(tmp_path, TE, BLOCKS)
    with pytest.raises(ConfigError, match="q_lora_rank is 28, but products in FP8 take multiples of 16"):
        check_acceleration(given, actor_spec(given), config_of("deepseek v3", hidden_size=64), able)


@pytest.mark.parametrize("key", ["algorithm.kl_coef=0.1", "actor.offload=all"])
def test_in_grpo_parameters_in_fp8_stay_where_they_are(tmp_path: Path, key: str) -> None:
    (tmp_path / "rl.yaml").write_text(RL)
    wide = config_of("qwen3", hidden_size=64, intermediate_size=64)
    given = load_config(tmp_path / "rl.yaml", (TE, BLOCKS, KEPT))
    check_acceleration(given, actor_spec(given), wide, able)
    given = load_config(tmp_path / "rl.yaml", (TE, BLOCKS, KEPT, key))
    with pytest.raises(ConfigError, match=rf"model\.fp8\.parameters: true with {key.partition('=')[0]}"):
        check_acceleration(given, actor_spec(given), wide, able)


def test_parameters_in_fp8_are_had_where_they_can_be(tmp_path: Path) -> None:
    given = config(tmp_path, TE, BLOCKS, KEPT)
    check_acceleration(given, actor_spec(given), config_of("glm4 moe", **WIDE), able)
    fp8 = fp8_of(given)
    assert fp8 is not None and fp8.parameters
