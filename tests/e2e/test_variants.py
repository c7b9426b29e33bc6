"""What the config can turn on, each run once: the files it leaves say that it took effect."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.distributed.world import World
from tests.e2e.jobs import lines, run_main

NUM_SFT = 4
ROUTER = "actor.router={aux_loss: global_batch, aux_loss_coeff: 0.01, z_loss_coeff: 0.001}"


def run(world: World, toy: Path, name: str, *overrides: str, config: str = "grpo") -> Path:
    """Run on two ranks into ``runs/NAME``."""
    arguments = [f"{config}.yaml", f"output_dir=runs/{name}", "logging.progress=none", *overrides]
    results = world.run(
        run_main, {"folder": str(toy), "arguments": arguments}, size=2, start=False, timeout_s=200
    )
    assert [result["status"] for result in results] == [0, 0]
    return toy / "runs" / name


@pytest.fixture(scope="module")
def base(toy: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """Steps of the run that the others are compared with."""
    return lines(checkpoint.parents[1] / "metrics.jsonl")


@pytest.fixture(scope="module")
def much(world: World, toy: Path) -> Path:
    return run(
        world, toy, "much", "seed=2", "actor.backend=megatron:(attn:t2|ffn:e2)", "rollout.backend=vllm:t2",
        "rollout.expert_parallel=true", "algorithm.minibatches_per_step=2", "algorithm.kl_coef=0.1",
        "algorithm.sampler_correction=2", "checkpoint.every_steps=1", "checkpoint.keep_last=2",
        "evaluation.every_steps=1", "evaluation.num_prompts=3", "rollout.temperature=0.8", ROUTER,
        "actor.recompute=selective", "actor.recompute_modules=[core_attn, moe]",
    )  # fmt: skip


@pytest.mark.vllm
def test_a_grpo_run_reports_its_routers(much: Path) -> None:
    records = lines(much / "metrics.jsonl")
    assert {each["phase"] for each in records} == {"sft", "grpo"}
    assert all(each["router_aux_loss"] >= 0.99 and each["router_z_loss"] > 0 for each in records)


@pytest.mark.vllm
def test_another_seed_is_another_run(base: list[dict[str, Any]], much: Path) -> None:
    losses = [each["loss"] for each in lines(much / "metrics.jsonl")[:NUM_SFT]]
    assert all(a != b["loss"] for a, b in zip(losses, base, strict=False))


@pytest.mark.vllm
def test_minibatches_move_the_policy_within_a_step_and_away_from_the_reference(much: Path) -> None:
    first, *later = lines(much / "metrics.jsonl")[NUM_SFT:]
    # The reference is the policy at the first rollout: only the second of its two updates is away from it.
    assert 0 < first["ref_kl"] < max(each["ref_kl"] for each in later)
    # Taken before the first of the two, the trainer's log-probabilities are the sampler's.
    assert all(each["k3_kl"] <= 1e-6 for each in (first, *later))


@pytest.mark.vllm
def test_only_the_last_checkpoints_are_kept(much: Path) -> None:
    names = sorted(path.name for path in (much / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("step")] == ["step_000006", "step_000007"]


@pytest.mark.vllm
def test_held_out_prompts_are_evaluated_as_often_as_asked(much: Path) -> None:
    found = lines(much / "evaluations.jsonl")
    assert [each["step"] for each in found] == [0, 4, 5, 6, 7]
    assert {each["num_prompts"] for each in found} == {3}


@pytest.mark.vllm
def test_shuffled_rewards_are_the_same_rewards_given_to_others(
    world: World, toy: Path, base: list[dict[str, Any]]
) -> None:
    folder = run(
        world, toy, "shuffled", "reward.name=shuffled:rewards:digit_share", "algorithm.total_steps=1"
    )
    control, real = lines(folder / "metrics.jsonl")[NUM_SFT], base[NUM_SFT]
    for key in ("reward_mean", "reward_std", "completion_length_mean", "num_tokens", "policy_version"):
        assert control[key] == real[key]
    assert control["grad_norm"] != real["grad_norm"]
    assert lines(folder / "evaluations.jsonl")[1]["accuracy"] == _accuracy(toy, step=NUM_SFT)


def _accuracy(toy: Path, step: int) -> float:
    found = {each["step"]: each["accuracy"] for each in lines(toy / "runs" / "grpo" / "evaluations.jsonl")}
    return float(found[step])


@pytest.mark.vllm
def test_context_parallel_ranks_train_the_policy_that_data_parallel_ranks_do(
    world: World, toy: Path, base: list[dict[str, Any]]
) -> None:
    folder = run(
        world, toy, "context", "actor.backend=megatron:(attn:c2|ffn:e2)", "algorithm.minibatches_per_step=2",
        "algorithm.kl_coef=0.1", "algorithm.total_steps=2",
    )  # fmt: skip
    steps = lines(folder / "metrics.jsonl")
    for own, other in zip(steps[:NUM_SFT], base, strict=False):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for each in steps[NUM_SFT:]:
        assert each["k3_kl"] <= 1e-6 and each["ref_kl"] > 0


@pytest.fixture(scope="module")
def bf16(world: World, toy: Path, checkpoint: Path) -> Path:
    return run(world, toy, "bf16", *in_bf16(checkpoint))


def in_bf16(checkpoint: Path) -> list[str]:
    return [
        "model.init=null", f"model.path={checkpoint}", "model.tokenizer=null", "model.precision=bf16",
        "algorithm.max_k3_kl=0.05", "algorithm.warm_start=null", "data.warm_start=null",
        "algorithm.total_steps=2",
    ]  # fmt: skip


@pytest.mark.vllm
def test_bf16_goes_on_from_a_checkpoint_and_stays_near_its_sampler(bf16: Path) -> None:
    folder = bf16
    steps = lines(folder / "metrics.jsonl")
    # bf16 has 8 bits of mantissa: far from fp32's 1e-13, and no more than a few hundredths.
    assert all(1e-10 < each["k3_kl"] < 0.05 for each in steps)
    saved = folder / "checkpoints" / "step_000002"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118


@pytest.mark.vllm
def test_a_trainer_that_makes_room_while_the_engine_samples_trains_the_same(
    world: World, toy: Path, checkpoint: Path, bf16: Path
) -> None:
    folder = run(world, toy, "offload", *in_bf16(checkpoint), "actor.offload=all", "checkpoint.every_steps=1")

    def numbers(path: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in step.items() if not key.endswith("_s")}
            for step in lines(path / "metrics.jsonl")
        ]

    assert numbers(folder) == numbers(bf16)
    moves = json.loads((folder / "summary.json").read_text())["memory_moves"]
    assert [each["what"] for each in moves if each["stage"] == "push"] == [
        "gradients offloaded", "optimizer offloaded"
    ]  # fmt: skip
    assert [each["what"] for each in moves if each["stage"] == "sampling"] == ["weights offloaded"]
    assert len([each for each in moves if each["stage"] == "training"]) == 3
    assert all(each["moved"] > 0 for each in moves)


def test_sft_alone_learns_and_starts_no_engine(world: World, toy: Path) -> None:
    folder = run(world, toy, "sft", config="sft")
    steps = lines(folder / "metrics.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3 and "policy_version" not in steps[-1]
    names = {path.name for path in folder.iterdir()}
    assert "engine" not in names and "reward.png" not in names
    assert (folder / "checkpoints" / "step_000004" / "tokenizer.json").is_file()


def test_sft_in_fp8_by_another_dispatcher_writes_bf16(world: World, toy: Path) -> None:
    folder = run(
        world, toy, "fp8", "model.precision=fp8_blockwise", "model.fp8.gradients=e5m2",
        "actor.moe.dispatcher=allgather", config="sft",
    )  # fmt: skip
    steps = lines(folder / "metrics.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    uses = json.loads((folder / "summary.json").read_text())["uses"]
    assert uses == {
        "layers": "torch_native", "precision": "fp8_blockwise", "dispatcher": "allgather",
        "logprobs": "mtrl.logprobs", "rotation": "megatron",
        "optimizer": "torch.optim.adamw.AdamW", "device": "cpu",
    }  # fmt: skip
    with safe_open(folder / "checkpoints" / "step_000004" / "model.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
