"""`actor.optimizer.offload_fraction`: Megatron's optimizer that steps on the host, whose questions about
devices are answered by pretended_device.py. What it computes, what checkpoints hold of it, and what is
offloaded between phases.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.checkpoint_runs import load, newest, open_run, own_tensors, restore, save, step
from tests.distributed.pretended_device import OnHost, pretend
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import build_family_toy
from tests.family_toys import save as save_toy

SPEC, TOY = "megatron:(attn:d2|ffn:e2)", "qwen3 moe"
FRACTIONS = (0.0, 0.5, 1.0)
RESUMED = [(0.0, 1.0), (1.0, 0.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (1.0, 1.0)]
"""Fractions that a checkpoint was written and is opened with."""


def runs(folder: str, out: str, is_fused: bool) -> dict[str, Any]:
    """On a rank, by fraction: two steps, a checkpoint, a third; and the third again from checkpoints.

    ``is_fused``: without offloading, Adam computes as the host's does, in torch's fused kernel.
    """
    pretend()
    found: dict[str, Any] = {}
    path = Path(folder) / TOY
    for groups, *_ in each_case([[SPEC, 1, TOY, TOY]]):
        after = {}
        for fraction in FRACTIONS:
            trainer = opened(groups, path, fraction, is_fused)
            held = {each.data_ptr() for each in trainer.held("optimizer")}
            results = [step(trainer, number) for number in range(2)]
            save(trainer, Path(out) / str(fraction), path, 2)
            results.append(step(trainer, 2))
            after[fraction] = own_tensors(trainer)
            found[str(fraction)] = {
                "results": [list(each) for each in results], "adams": adams(trainer),
                "tensors": {key: each.as_subclass(torch.Tensor) for key, each in after[fraction].items()},
                "elements": elements(after[fraction]),
                "masters held at once": masters_on_device(trainer) <= held,
                "state held": state_on_device(after[fraction])
                <= {each.data_ptr() for each in trainer.held("optimizer")},
            }  # fmt: skip
        found["resumed"] = {}
        for written, read in RESUMED:
            checkpoints = Path(out) / str(written)
            again = opened(groups, newest(checkpoints), read, is_fused)
            restore(again, checkpoints)
            loss, norm = step(again, 2)
            same = own_tensors(again)
            found["resumed"][f"{written} {read}"] = {
                "step": [loss, norm],
                "differ": [key for key, each in after[read].items() if not torch.equal(each, same[key])],
            }
    return found


def opened(groups: Any, path: Path, fraction: float, is_fused: bool) -> Any:
    trainer = open_run(load(groups, 1, path, "bf16"), distributed=True, offload_fraction=fraction)
    if not fraction and is_fused:
        for part in trainer.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                group["fused"] = True
    return trainer


def adams(trainer: Any) -> list[str]:
    from mtrl.adam import adams_of, parts_of

    return sorted({type(adam).__name__ for part in parts_of(trainer.optimizer) for adam in adams_of(part)})


def elements(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of masters and moments, on the host and in all."""
    state = [each for key, each in tensors.items() if "shard" in key]
    return {
        "host": sum(each.numel() for each in state if isinstance(each, OnHost)),
        "all": sum(each.numel() for each in state),
    }


def masters_on_device(trainer: Any) -> set[int]:
    from mtrl.checkpoint.optimizer_state import OptimizerState

    shards = OptimizerState.of(trainer.model, trainer.optimizer).shards
    return {shard.main.data_ptr() for shard in shards if not isinstance(shard.main, OnHost)}


def state_on_device(tensors: dict[str, torch.Tensor]) -> set[int]:
    state = [each for key, each in tensors.items() if "shard" in key]
    return {each.data_ptr() for each in state if not isinstance(each, OnHost)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_toy(build_family_toy(TOY, seed=3), folder / TOY)
    return folder


@pytest.fixture(scope="module")
def found(world: World, toy: Path) -> list[Any]:
    return run(world, toy, "torch", is_fused=True)


def run(world: World, toy: Path, name: str, *, is_fused: bool) -> list[Any]:
    arguments = {"folder": str(toy), "out": str(toy / name), "is_fused": is_fused}
    ranks: list[Any] = world.run(runs, arguments, size=2)
    return ranks


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_where_the_optimizer_steps_changes_no_bit(found: list[Any], fraction: float) -> None:
    for rank in found:
        plain, offloaded = rank["0.0"], rank[str(fraction)]
        assert offloaded["results"] == plain["results"]
        assert offloaded["tensors"].keys() == plain["tensors"].keys()
        for key, tensor in plain["tensors"].items():
            assert torch.equal(offloaded["tensors"][key], tensor), key


def test_the_fraction_is_what_lives_on_the_host(found: list[Any]) -> None:
    for rank in found:
        shares = {fraction: rank[str(fraction)]["elements"] for fraction in FRACTIONS}
        assert shares[0.0]["host"] == 0
        assert shares[1.0]["host"] == shares[1.0]["all"] == shares[0.0]["all"]
        # Whole parameters, so somewhat more than the half: Megatron moves until it is reached.
        assert 0.5 <= shares[0.5]["host"] / shares[0.5]["all"] < 0.8


@pytest.mark.parametrize(("written", "read"), RESUMED)
def test_a_run_resumed_with_any_fraction_is_the_run_that_never_stopped(
    found: list[Any], written: float, read: float
) -> None:
    for rank in found:
        resumed = rank["resumed"][f"{written} {read}"]
        assert resumed["step"] == rank[str(read)]["results"][2]
        assert resumed["differ"] == []


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_what_stays_on_the_device_is_offloaded_between_phases(found: list[Any], fraction: float) -> None:
    for rank in found:
        assert rank[str(fraction)]["masters held at once"] and rank[str(fraction)]["state held"]


@pytest.mark.one_stack
def test_it_steps_beside_transformer_engines_adam(te_world: World, toy: Path, found: list[Any]) -> None:
    for rank, torchs in zip(run(te_world, toy, "te", is_fused=False), found, strict=True):
        assert rank["0.0"]["adams"] == ["FusedAdam"]
        assert rank["0.5"]["adams"] == ["AdamW", "FusedAdam"]
        assert rank["1.0"]["adams"] == ["AdamW"]
        for fraction in FRACTIONS[1:]:
            # Two kernels round differently, and the weights are bf16.
            expected = [pytest.approx(each, rel=2e-3) for each in torchs["0.0"]["results"]]
            assert rank[str(fraction)]["results"] == expected
            resumed = rank["resumed"][f"{fraction} {fraction}"]
            assert resumed["step"] == rank[str(fraction)]["results"][2]
            assert resumed["differ"] == []
