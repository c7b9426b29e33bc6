"""Transformer Engine's Adam under Megatron's, over the reference of its API: its own count of steps, and
moments in bf16, go through a checkpoint bit by bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.distributed.checkpoint_runs import load, newest, open_run, own_tensors, restore, save, step
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import build_family_toy
from tests.family_toys import save as save_toy

pytestmark = pytest.mark.one_stack

SPEC, TOY = "megatron:(attn:d2|ffn:e2)", "qwen3 moe"
MOMENTS = ("fp32", "bf16")


def runs(folder: str) -> dict[str, Any]:
    """On a rank: two steps, a checkpoint, a third; and the third again from the checkpoint."""
    found: dict[str, Any] = {}
    path = Path(folder) / TOY
    for groups, *_ in each_case([[SPEC, 1, TOY, TOY]]):
        for moments in MOMENTS:
            out = Path(folder) / moments
            trainer = open_run(load(groups, 1, path, "bf16"), distributed=True, moments=moments)
            losses = [step(trainer, number)[0] for number in range(2)]
            save(trainer, out, path, 2)
            before = {key: value.clone() for key, value in own_tensors(trainer).items()}
            losses.append(step(trainer, 2)[0])
            again = open_run(load(groups, 1, newest(out), "bf16"), distributed=True, moments=moments)
            restore(again, out)
            opened = own_tensors(again)
            same = [key for key, value in before.items() if not torch.equal(value, opened[key])]
            repeated = step(again, 2)[0]
            after, resumed = own_tensors(trainer), own_tensors(again)
            inner = trainer.optimizer.chained_optimizers[0].optimizer
            found[moments] = {
                "losses": losses,
                "repeated": repeated,
                "opened differ": same,
                "differ": [key for key, value in after.items() if not torch.equal(value, resumed[key])],
                "adam": type(inner).__name__,
                "dtypes": sorted({f"{key.split(' ')[0]} {value.dtype}" for key, value in after.items()}),
                "steps": int(inner.param_groups[0]["step"]),
            }
    return found


@pytest.fixture(scope="module")
def found(te_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    save_toy(build_family_toy(TOY, seed=3), folder / TOY)
    return folder, te_world.run(runs, {"folder": str(folder)}, size=2)


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_run_resumed_is_the_run_that_never_stopped(found: tuple[Path, list[Any]], moments: str) -> None:
    for rank in found[1]:
        run = rank[moments]
        assert run["adam"] == "FusedAdam" and run["steps"] == 3
        assert run["opened differ"] == [] and run["differ"] == []
        assert run["repeated"] == run["losses"][2]


def test_moments_are_kept_in_their_dtype_and_written_in_float32(found: tuple[Path, list[Any]]) -> None:
    folder, ranks = found
    dtypes = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}
    for moments, dtype in dtypes.items():
        kinds = {kind for kind in ranks[0][moments]["dtypes"] if kind.startswith(("exp_avg", "master"))}
        assert kinds == {f"exp_avg {dtype}", f"exp_avg_sq {dtype}", "master torch.float32"}
        for file in (folder / moments / "step_000002" / "training").glob("optimizer-*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F32"}  # noqa: SIM118


def test_moments_in_bf16_train_nearly_as_in_float32(found: tuple[Path, list[Any]]) -> None:
    exact, rounded = (found[1][0][moments]["losses"] for moments in MOMENTS)
    assert rounded[0] == exact[0] and rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-3)
