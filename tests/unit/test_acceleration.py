"""What is asked of accelerators and cannot work is refused before anything starts: the key, and the fix."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mtrl.acceleration import check_acceleration, this_machine
from mtrl.config import Config
from mtrl.config_check import actor_spec
from mtrl.config_load import load_config
from mtrl.model_settings import fp8_of, moe_fields, weights_precision
from mtrl.models.config import ModelConfig
from mtrl.models.families import family_of
from mtrl.models.precision import Fp8
from mtrl.parallel.capabilities import Machine, Survey
from mtrl.parallel.capability_features import FEATURES
from mtrl.parallel.errors import ConfigError
from tests.family_toys import build_family_toy

FILE = """
output_dir: out
algorithm: {name: sft, total_steps: 2, samples_per_step: 2, max_tokens_per_microbatch: 64}
model: {init: model}
actor: {backend: "megatron:(attn:d2|ffn:e2)", optimizer: {lr: 1.0e-3}}
data: {train: train.jsonl}
"""
TE = "model.backend=transformer_engine"
DEEPEP = "actor.moe.dispatcher=deepep"
CUTLASS = "rollout.moe_backend=flashinfer_cutlass"
OVERLAP = "actor.moe.overlap_expert_communication=true"
SHARED = "actor.moe.shared_expert_overlap=true"
BUFFERS = "actor.tp_comm_overlap=true"
OFFLOADED = "actor.optimizer.offload_fraction=0.5"
# Widths that products in FP8 take, over two ranks too.
WIDE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "moe_intermediate_size": 64,
}  # fmt: skip
T2 = "actor.backend=megatron:(attn:t2|ffn:e2)"
P2 = "actor.backend=megatron:(attn:d2p2|ffn:p2e2)"


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    """A mixture with shared experts, of which the first layer is dense."""
    return config_of("glm4 moe")


def config_of(toy: str, **sizes: Any) -> ModelConfig:
    made: Any = build_family_toy(toy, seed=0, **sizes)
    fields = made.config.to_dict() | {"architectures": [type(made).__name__]}
    return family_of(fields).read_config(fields)


def config(folder: Path, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(FILE)
    return load_config(path, overrides)


# Holds on any machine: nothing is asked of it, which the survey of an able one shows.
RULES: dict[str, tuple[list[str], str]] = {
    "fp8 options without fp8": (["model.fp8.gradients=e5m2"], "model.fp8: given with model.precision bf16"),
    "delayed scales in plain torch": (
        ["model.precision=fp8_delayed"],
        "given fp8_delayed, but torch_native computes fp8_blockwise alone",
    ),
    "mxfp8 in plain torch": (
        ["model.precision=mxfp8"],
        "write that, or write model.backend=transformer_engine",
    ),
    "torch's products on a GPU": (
        ["model.precision=fp8_blockwise", "model.fp8.products=scaled_mm"],
        "model.fp8.products: scaled_mm, whose products torch rounds to bf16 on a GPU",
    ),
    "no layer left for fp8": (
        ["model.precision=fp8_blockwise", "model.fp8.bf16_first_layers=2", "model.fp8.bf16_last_layers=9"],
        "2 first and 9 last layers in bf16 leave none of",
    ),
    "bf16 layers under delayed scales": (
        [TE, "model.precision=fp8_delayed", "model.fp8.bf16_first_layers=1"],
        "Megatron-Core keeps no layer in bf16 under fp8_delayed",
    ),
    "more bf16 layers than a stage has": (
        [TE, "model.precision=fp8_blockwise", "model.fp8.bf16_first_layers=3", "actor.backend=megatron:p2"],
        "Megatron-Core takes at most the 2 of one of 2 pipeline stages",
    ),
    "experts over six ranks": (
        [DEEPEP, "actor.backend=megatron:(attn:d6|ffn:e6)"],
        "over 6 ranks, which DeepEP 1.2.1 has no settings for; the nearest that it has is 4",
    ),
    "odd SMs": ([DEEPEP, "actor.moe.num_sms=7"], "actor.moe.num_sms: given 7, which is odd"),
    "SMs of alltoall": (["actor.moe.num_sms=8"], "has no effect on dispatcher alltoall"),
    "deepep on one rank": (
        [DEEPEP, "actor.backend=megatron:(attn:d2|ffn:d2)"],
        "whose experts are on one rank, so nothing travels",
    ),
    "deepep in fp32": ([DEEPEP, "model.precision=fp32"], "DeepEP's kernels send bf16"),
    "overlap on one rank": ([OVERLAP, "actor.backend=megatron:d2"], "has experts on one rank"),
    "overlap of allgather": ([OVERLAP, "actor.moe.dispatcher=allgather"], "which has nothing to overlap"),
    "overlap in fp32": ([OVERLAP, "model.precision=fp32"], "with model.precision fp32; write bf16"),
    "overlap with full recomputation": ([OVERLAP, "actor.recompute=full"], "with actor.recompute full"),
    "overlap with experts computed again": (
        [OVERLAP, "actor.recompute=selective", "actor.recompute_modules=[moe]"],
        "with recompute_modules that hold moe",
    ),
    "overlap with losses of routers": (
        [OVERLAP, "actor.router.z_loss_coeff=1e-3"],
        "with losses or bias updates of actor.router",
    ),
    "both overlaps": ([OVERLAP, SHARED], "with shared_expert_overlap; write one of both"),
    "overlap with plain stages": ([OVERLAP, P2], "write actor.virtual_pipeline_size=2 or more"),
    "shared experts by allgather": (
        [SHARED, "actor.moe.dispatcher=allgather"],
        "true with dispatcher allgather; it needs alltoall",
    ),
    "shared experts computed again": (
        [SHARED, "actor.recompute=selective", "actor.recompute_modules=[shared_experts]"],
        "with recompute_modules that hold shared_experts",
    ),
    "moments of every rank": (
        ["actor.optimizer.moments=bf16", "actor.optimizer.distributed=false"],
        "which Megatron-Core has in its distributed optimizer alone",
    ),
    "offloaded moments in bf16": (
        [OFFLOADED, "actor.optimizer.moments=bf16"],
        "given 0.5, but what steps on the host keeps fp32 moments",
    ),
    "offloading of every rank's state": (
        [OFFLOADED, "actor.optimizer.distributed=false"],
        "which checkpoints know in Megatron-Core's distributed optimizer alone",
    ),
    "offloading beside fp32 weights": (
        [OFFLOADED, "model.precision=fp32"],
        "Megatron-Core makes no such optimizer of fp32 weights; write model.precision=bf16, or",
    ),
    "offloading without an engine": (["actor.offload=all"], "sft, which has no engine to make room for"),
    "sleep without an engine": (["rollout.sleep=true"], "rollout.sleep: true with sft"),
    "experts' kernels without an engine": (
        [CUTLASS],
        "given flashinfer_cutlass with sft, which has no engine",
    ),
    "other kernels of FP8 experts": (
        [CUTLASS, "algorithm.name=grpo", "rollout.backend=vllm:d2", "rollout.dtype=fp8"],
        "given flashinfer_cutlass with rollout.dtype fp8",
    ),
    "user buffers in plain torch": (
        [BUFFERS],
        "actor.tp_comm_overlap: true, but with torch_native, which has no such buffers",
    ),
    "user buffers of one rank": ([TE, BUFFERS], "no tokens travel between tensor parallel ranks"),
    "user buffers of whole sequences": (
        [TE, BUFFERS, "actor.sequence_parallel=false", "actor.backend=megatron:t2"],
        "with actor.sequence_parallel False; write t2 or more and auto",
    ),
    "user buffers across nodes": (
        [TE, BUFFERS, "actor.backend=megatron:t16"],
        "16 tensor parallel ranks, which do not fit into nodes of 8",
    ),
    "user buffers of blocks": (
        [TE, BUFFERS, T2, "model.precision=fp8_blockwise"],
        "with model.precision fp8_blockwise, whose scales do not travel in them",
    ),
    "user buffers of two microbatches": ([TE, BUFFERS, T2, OVERLAP], "two microbatches in the same buffers"),
}


def able() -> Survey:
    """A machine on which everything works."""
    return Survey(
        machine=Machine(gpu="GPU", sm=(10, 0), cuda=(13, 0)),
        packages=(),
        features={feature.name: "" for feature in FEATURES},
    )


@pytest.mark.parametrize("case", RULES)
def test_what_no_machine_can_do_is_refused(tmp_path: Path, model: ModelConfig, case: str) -> None:
    overrides, message = RULES[case]
    given = config(tmp_path, *overrides)
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), model, able)
    assert message in str(caught.value)


@pytest.mark.parametrize("override", [DEEPEP, "actor.moe.permute_fusion=true"])
def test_a_dense_model_has_no_tokens_to_dispatch(tmp_path: Path, override: str) -> None:
    given = config(tmp_path, "actor.backend=megatron:d2", override)
    with pytest.raises(ConfigError, match=r"actor\.moe: given for a dense model"):
        check_acceleration(given, actor_spec(given), config_of("qwen3"), able)


@pytest.mark.parametrize(
    ("toy", "override", "message"),
    [
        ("gpt oss", "model.precision=bf16", "gpt_oss has attention sinks"),
        ("qwen3 moe", "model.precision=fp32", "precision fp32: its attention over packed samples is of bf16"),
    ],
)
def test_what_transformer_engine_cannot_compute_is_refused(
    tmp_path: Path, toy: str, override: str, message: str
) -> None:
    given = config(tmp_path, TE, override)
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), config_of(toy), able)
    assert f"model.backend: transformer_engine: {message}" in str(caught.value)


def test_a_model_without_shared_experts_has_none_to_overlap(tmp_path: Path) -> None:
    given = config(tmp_path, SHARED)
    with pytest.raises(ConfigError, match="this model has no shared experts"):
        check_acceleration(given, actor_spec(given), config_of("qwen3 moe"), able)


@pytest.mark.parametrize(
    ("toy", "hidden_size", "message"),
    [
        ("deepseek v3", 64, "deepseek_v3 has latent attention, whose projections have no such buffers"),
        ("qwen3", 48, "hidden_size 48 is no multiple of 32"),
    ],
)
def test_user_buffers_of_a_model_that_has_none_are_refused(
    tmp_path: Path, toy: str, hidden_size: int, message: str
) -> None:
    given = config(tmp_path, TE, BUFFERS, "actor.backend=megatron:t2")
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), replace(config_of(toy), hidden_size=hidden_size), able)
    assert message in str(caught.value)


def test_user_buffers_are_refused_where_gpus_cannot_share_them(tmp_path: Path, model: ModelConfig) -> None:
    model = replace(model, hidden_size=64)
    given = config(tmp_path, TE, BUFFERS, T2)
    check_acceleration(given, actor_spec(given), model, able)
    older = replace(able(), features={**able().features, "tp_comm_overlap": "wants sm_90"})
    with pytest.raises(
        ConfigError, match=r"actor\.tp_comm_overlap: true, which cannot be had here: wants sm_90"
    ):
        check_acceleration(given, actor_spec(given), model, lambda: older)


# What this machine lacks, in the words of the survey.
ASKED: dict[str, tuple[list[str], str, str]] = {
    "transformer_engine": ([TE], "model.backend: transformer_engine", "model.backend=torch_native"),
    "deepep": ([DEEPEP], "actor.moe.dispatcher: deepep", "actor.moe.dispatcher=alltoall"),
    "hybridep": (["actor.moe.dispatcher=hybridep"], "actor.moe.dispatcher: hybridep", "alltoall"),
    "bf16_moments": (["actor.optimizer.moments=bf16"], "actor.optimizer.moments: bf16", "moments=fp32"),
    "host_optimizer": ([OFFLOADED], "actor.optimizer.offload_fraction: 0.5", "offload_fraction=0"),
    "permute_fusion": (["actor.moe.permute_fusion=true"], "actor.moe.permute_fusion: true", "false"),
}


@pytest.mark.parametrize("feature", ASKED)
def test_what_this_machine_lacks_is_refused_in_the_words_of_the_survey(
    tmp_path: Path, model: ModelConfig, feature: str
) -> None:
    overrides, key, instead = ASKED[feature]
    obstacle = this_machine().obstacle(feature)
    given = config(tmp_path, *overrides)
    if not obstacle:
        check_acceleration(given, actor_spec(given), model)
        return
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), model)
    assert f"{key}, which cannot be had here: {obstacle}; write " in str(caught.value)
    assert str(caught.value).endswith(instead)


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_delayed", "mxfp8"])
def test_each_recipe_of_transformer_engine_is_asked_for_by_name(tmp_path: Path, recipe: str) -> None:
    given, model = config(tmp_path, TE, f"model.precision={recipe}"), config_of("glm4 moe", **WIDE)
    lacking = replace(able(), features=able().features | {recipe: "needs a GPU, found none"})
    with pytest.raises(ConfigError, match=f"{recipe}, which cannot be had here: needs a GPU"):
        check_acceleration(given, actor_spec(given), model, lambda: lacking)
    check_acceleration(given, actor_spec(given), model, able)


def test_plain_torch_asks_no_machine(tmp_path: Path, model: ModelConfig) -> None:
    def nobody() -> Survey:
        raise AssertionError("asked")

    for overrides in (
        [],
        ["model.precision=fp8_blockwise"],
        ["actor.moe.dispatcher=allgather"],
        [SHARED],
        [OVERLAP],
    ):
        given = config(tmp_path, *overrides)
        check_acceleration(given, actor_spec(given), model, nobody)


def test_fp8_is_bf16_with_other_products(tmp_path: Path) -> None:
    given = config(tmp_path, "model.precision=fp8_blockwise", "model.fp8.bf16_last_layers=1")
    assert weights_precision(given) == "bf16"
    assert fp8_of(given) == Fp8(recipe="fp8_blockwise", bf16_last_layers=1)
    delayed = fp8_of(config(tmp_path, TE, "model.precision=fp8_delayed"))
    assert delayed is not None and delayed.gradients == "e5m2"
    assert fp8_of(config(tmp_path)) is None and weights_precision(config(tmp_path)) == "bf16"
    assert weights_precision(config(tmp_path, "model.precision=fp32")) == "fp32"


IS_0_16 = version("megatron-core").startswith("0.16.")
NUM_SMS = {
    name: f"moe_{name}_num_sms" if IS_0_16 else "moe_flex_dispatcher_num_sms"
    for name in ("deepep", "hybridep")
}


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ([], {}),
        (["actor.moe.dispatcher=allgather"], {"moe_token_dispatcher_type": "allgather"}),
        (
            [DEEPEP],
            {
                "moe_token_dispatcher_type": "flex",
                "moe_flex_dispatcher_backend": "deepep",
                NUM_SMS["deepep"]: 20,
            },
        ),
        (
            [DEEPEP, "actor.backend=megatron:(attn:d16|ffn:e16)"],
            {
                "moe_token_dispatcher_type": "flex",
                "moe_flex_dispatcher_backend": "deepep",
                NUM_SMS["deepep"]: 24,
            },
        ),
        (
            ["actor.moe.dispatcher=hybridep", "actor.moe.num_sms=16"],
            {
                "moe_token_dispatcher_type": "flex",
                "moe_flex_dispatcher_backend": "hybridep",
                NUM_SMS["hybridep"]: 16,
            },
        ),
        ([SHARED], {"moe_shared_expert_overlap": True}),
        ([OVERLAP], {"overlap_moe_expert_parallel_comm": True}),
    ],
)
def test_options_are_these_fields_of_megatrons(
    tmp_path: Path, overrides: list[str], fields: dict[str, Any]
) -> None:
    given = config(tmp_path, *overrides)
    assert moe_fields(given, actor_spec(given)) == fields


GRPO = ["algorithm.name=grpo", "rollout.backend=vllm:d2"]


def test_experts_kernels_of_gpus_are_refused_elsewhere(tmp_path: Path, model: ModelConfig) -> None:
    given = config(tmp_path, *GRPO, CUTLASS)
    obstacle = this_machine().obstacle("flashinfer_experts")
    if not obstacle:
        check_acceleration(given, actor_spec(given), model)
        return
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), model)
    assert f"rollout.moe_backend: flashinfer_cutlass, which cannot be had here: {obstacle}" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("toy", "reason"), [("qwen3", "for a dense model"), ("gpt oss", "for experts with biases")]
)
def test_kernels_of_other_experts_are_refused(tmp_path: Path, toy: str, reason: str) -> None:
    given = config(tmp_path, "actor.backend=megatron:d2", *GRPO, CUTLASS)
    with pytest.raises(ConfigError, match=f"given flashinfer_cutlass {reason}"):
        check_acceleration(given, actor_spec(given), config_of(toy), able)


def test_an_engine_that_sleeps_is_refused_where_vllm_has_none(tmp_path: Path, model: ModelConfig) -> None:
    given = config(tmp_path, *GRPO, "rollout.sleep=true")
    obstacle = this_machine().obstacle("sleep")
    if not obstacle:
        check_acceleration(given, actor_spec(given), model)
        return
    with pytest.raises(ConfigError) as caught:
        check_acceleration(given, actor_spec(given), model)
    assert f"rollout.sleep: true, which cannot be had here: {obstacle}" in str(caught.value)
