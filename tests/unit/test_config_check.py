"""Rules between keys, and between the config and the number of ranks."""

import sys
from pathlib import Path

import pytest

from mtrl.config import Config
from mtrl.config_check import check_config, check_packages, torchrun_line, world_size_from_env
from mtrl.config_load import load_config
from mtrl.parallel.errors import ConfigError, LayoutError, MissingPackageError, SpecError

ROOT = Path(__file__).resolve().parents[2]
GRPO = """\
output_dir: runs/x
algorithm: {name: grpo, total_steps: 60, prompts_per_step: 16, max_tokens_per_microbatch: 4096}
model: {path: /models/m}
actor:
  backend: "megatron:(attn:d2|ffn:e2)"
  optimizer: {lr: 1.0e-6}
rollout:
  backend: "vllm:d2"
data: {train: train.jsonl, eval: eval.jsonl}
reward: {name: exact_match}
"""
SFT = """\
output_dir: runs/x
algorithm: {name: sft, total_steps: 60, samples_per_step: 16, max_tokens_per_microbatch: 4096}
model: {init: configs/m.json}
actor: {backend: "megatron:d2", optimizer: {lr: 1.0e-6}}
data: {train: train.jsonl}
"""


def load(tmp_path: Path, *overrides: str, text: str = GRPO) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


WARM_START = "algorithm.warm_start={total_steps: 5, samples_per_step: 4, learning_rate: 1.0e-3}"
Case = tuple[type[Exception], list[str], str]
REFUSED: dict[str, Case] = {
    "both model sources": (ConfigError, ["model.init=x"], "given both (/models/m and x), needs exactly one"),
    "no model source": (ConfigError, ["model.path=null"], "given neither, needs exactly one"),
    "bad string": (SpecError, ["actor.backend=megatron:d2e3"], "actor.backend: "),
    "engine trains": (SpecError, ["actor.backend=vllm:d2"], "actor.backend: vllm samples; a training engine"),
    "trainer samples": (
        SpecError,
        ["rollout.backend=megatron:d2"],
        "rollout.backend: megatron trains; a sampling",
    ),
    "fsdp": (SpecError, ["actor.backend=fsdp:d2"], "does not run fsdp; write megatron:d2"),
    "archon": (SpecError, ["actor.backend=archon:d2t1"], "does not run archon; write megatron:d2"),
    "sglang": (SpecError, ["rollout.backend=sglang:d2"], "does not run sglang; write vllm:d2"),
    "no engine": (ConfigError, ["rollout.backend=''"], "rollout.backend: missing, grpo needs an engine"),
    "world size": (
        LayoutError,
        ["actor.backend=megatron:d4", "rollout.backend=vllm:d2t2"],
        "megatron:d4 needs 4 ranks and 2 were started; start it with\n"
        "  torchrun --nproc-per-node 4 mtrl/train.py CONFIG",
    ),
    "engine world": (
        LayoutError,
        ["rollout.backend=vllm:d2t2"],
        "vllm:d2t2 has 4 ranks and actor.backend megatron:d2e2 has 2; colocated engines share the actor's "
        "ranks: write vllm:d1t2",
    ),
    "engine pipeline": (ConfigError, ["rollout.backend=vllm:d1p2"], "write vllm:d1t2"),
    "separate": (ConfigError, ["rollout.placement=separate"], "separate is not run yet; write colocated"),
    "own process that sleeps": (
        ConfigError,
        ["rollout.process=own", "rollout.sleep=true"],
        "rollout.process: own with rollout.sleep, whose memory no other process can map",
    ),
    "ref layout": (ConfigError, ["ref.backend=megatron:d1t2"], 'leave it empty: ref.backend=""'),
    "ref string": (SpecError, ["ref.backend=megatron:z2"], "ref.backend: "),
    "no prompts": (
        ConfigError,
        ["algorithm.prompts_per_step=null"],
        "prompts_per_step: missing, grpo needs it",
    ),
    "no reward": (ConfigError, ["reward.name=''"], "reward.name: missing, grpo needs one"),
    "alone in a group": (ConfigError, ["rollout.n_samples=1"], "needs at least 2"),
    "updates": (
        ConfigError,
        ["algorithm.minibatches_per_step=129"],
        "given 129, needs at most 128, the completions of a step (16 prompts of 8)",
    ),
    "warm start without data": (
        ConfigError,
        [WARM_START],
        "data.warm_start: missing while algorithm.warm_start is",
    ),
    "data without warm start": (
        ConfigError,
        ["data.warm_start=a"],
        "algorithm.warm_start: missing while data.",
    ),
    "long warm-up of a warm start": (
        ConfigError,
        [WARM_START, "algorithm.warm_start.warmup_steps=9", "data.warm_start=a"],
        "algorithm.warm_start.warmup_steps: given 9, needs at most total_steps = 5",
    ),
    "long warm-up": (ConfigError, ["actor.optimizer.warmup_steps=61"], "given 61, needs at most 60"),
    "rates": (ConfigError, ["actor.optimizer.min_lr=1"], "min_lr: given 1, needs at most lr = 1e-06"),
    "evaluation": (ConfigError, ["evaluation.every_steps=5", "data.eval=null"], "data.eval: missing while"),
    "no room for a sample": (
        ConfigError,
        ["data.max_prompt_length=4000"],
        "given 4096, needs at least 5024: a prompt of 4000 and rollout.max_new_tokens = 1024",
    ),
    "no room for a completion": (
        ConfigError,
        ["rollout.max_new_tokens=4096"],
        "given 4096, needs at least 4097",
    ),
    "a loss of routers without weight": (
        ConfigError,
        ["actor.router.aux_loss=sequence"],
        "actor.router.aux_loss: given sequence with aux_loss_coeff 0; give both",
    ),
    "a weight without loss of routers": (
        ConfigError,
        ["actor.router.aux_loss_coeff=0.1"],
        "actor.router.aux_loss: given none with aux_loss_coeff 0.1; give both",
    ),
    **{
        f"frozen routers and {key}": (
            ConfigError,
            ["actor.router.freeze=true", f"actor.router.{key}=0.1"],
            "actor.router.freeze: true with a loss or a bias update of routers",
        )
        for key in ("z_loss_coeff", "bias_update_rate")
    },
    "virtual stages": (ConfigError, ["actor.virtual_pipeline_size=2"], "write p2 or more in actor.backend"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_together_is_refused_with_the_fix(tmp_path: Path, case: str) -> None:
    error, overrides, message = REFUSED[case]
    with pytest.raises(error) as caught:
        check_config(load(tmp_path, *overrides), 2)
    assert message in str(caught.value)


def test_what_can_run_together_is_not_refused(tmp_path: Path) -> None:
    for overrides in (
        [],
        ["actor.backend=megatron:p2", "actor.virtual_pipeline_size=2"],
        ["ref.backend=megatron:(attn:d2|ffn:e2)", "algorithm.kl_coef=0.1"],
        ["actor.optimizer.warmup_steps=120", "algorithm.minibatches_per_step=2"],
        ["rollout.max_new_tokens=4095"],
        ["actor.router={aux_loss: sequence, aux_loss_coeff: 1.0e-3, z_loss_coeff: 1.0e-3}"],
    ):
        check_config(load(tmp_path, *overrides), 2)
    check_config(load(tmp_path, text=SFT), 2)


def test_determinism_is_refused_where_the_environment_stands_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    check_config(load(tmp_path), 2)
    with pytest.raises(ConfigError, match="the environment has NVTE_ALLOW_NONDETERMINISTIC_ALGO=1; unset"):
        check_config(load(tmp_path, "deterministic=true"), 2)


def test_an_engine_of_its_own_process_is_refused_where_memory_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(tmp_path, "rollout.process=own")
    check_config(config, 2)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(ConfigError, match=r"expandable_segments in PYTORCH_CUDA_ALLOC_CONF.*process=trainer"):
        check_config(config, 2)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match="on darwin, and processes have memory in common on Linux alone"):
        check_config(config, 2)


def test_sft_asks_for_its_own_keys_and_not_for_those_of_grpo(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.samples_per_step: missing, sft needs it"):
        check_config(load(tmp_path, "algorithm.samples_per_step=null", text=SFT), 2)
    with pytest.raises(ConfigError, match=r"algorithm\.warm_start: given with sft"):
        check_config(load(tmp_path, WARM_START, text=SFT), 2)
    with pytest.raises(ConfigError, match=r"data\.eval: given with sft, which starts no engine"):
        check_config(load(tmp_path, "data.eval=eval.jsonl", text=SFT), 2)


def test_ending_the_warm_start_by_accuracy_needs_held_out_prompts(tmp_path: Path) -> None:
    early = [WARM_START, "algorithm.warm_start.until_accuracy=0.5", "data.warm_start=sft.jsonl"]
    overrides = [*early, "data.eval=null", "evaluation.every_steps=0"]
    with pytest.raises(ConfigError, match=r"until_accuracy: given without data\.eval"):
        check_config(load(tmp_path, *overrides), 2)


def test_a_spec_error_keeps_its_caret_under_the_character(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        check_config(load(tmp_path, "actor.backend=megatron:d2x2"), 2)
    _, text, caret = str(caught.value).splitlines()
    assert text[caret.index("^")] == "x"


def test_an_optional_package_that_is_asked_for_and_missing_is_refused_with_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("vllm", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # how Python itself marks a module as not there
    with pytest.raises(MissingPackageError, match=r"vllm is not installed.*pip install vllm==0\.32\.0"):
        check_packages(load(tmp_path))
    with pytest.raises(MissingPackageError, match=r"wandb is not installed.*pip install wandb"):
        check_packages(load(tmp_path, "logging.wandb=true", text=SFT))
    check_packages(load(tmp_path, text=SFT))


def test_the_world_size_is_the_one_torchrun_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size_from_env() == 1
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert world_size_from_env() == 32
    for wrong in ("0", "many", "-1"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(ConfigError, match="needs a positive integer"):
            world_size_from_env()


def test_the_torchrun_line_starts_as_many_ranks_as_are_needed() -> None:
    assert "--nproc-per-node 6 " in torchrun_line(6)
    assert "--nnodes 4 --nproc-per-node 8 " in torchrun_line(32)
    assert torchrun_line(12).endswith("N * M = 12")


@pytest.mark.parametrize("name", ["grpo_qwen3_30b_a3b.yaml", "sft_qwen3_moe.yaml"])
def test_the_node_configs_pass_every_check_on_eight_ranks(name: str) -> None:
    check_config(load_config(ROOT / "configs" / name), 8)
