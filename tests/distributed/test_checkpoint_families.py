"""Optimizer state of every family is saved under one layout and opened under another, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_runs import digest, load, open_run, resume, save
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import FAMILY_TOYS, build_family_toy
from tests.family_toys import save as save_toy

pytestmark = pytest.mark.one_stack

LAYOUTS = {
    True: ("megatron:(attn:d2|ffn:e2)", "megatron:(attn:t2|ffn:t2)"),
    False: ("megatron:d2", "megatron:t2"),
}


def move(folder: str, toys: dict[str, bool]) -> dict[str, Any]:
    """Per toy: what differs after a trip from one layout to the other; moments are random."""
    from mtrl.checkpoint.optimizer_state import OptimizerState

    found = {}
    for number in range(2):
        cases = [[LAYOUTS[is_moe][number], 1, toy, toy] for toy, is_moe in toys.items()]
        for groups, _, toy, _ in each_case(sorted(cases)):
            path, out = Path(folder) / toy, Path(folder) / f"{toy} saved"
            if number == 0:
                trainer = open_run(load(groups, 1, path, "bf16"), distributed=True)
                for shard in OptimizerState.of(trainer.model, trainer.optimizer).shards:
                    for tensor in shard.tensors().values():
                        tensor.copy_(torch.arange(tensor.numel()) + 1000 * shard.start)
                save(trainer, out, path, 1)
            else:
                again = resume(groups, 1, out, distributed=True, precision="bf16")
                save(again, out / "again", path, 1)
                if dist.get_rank() > 0:
                    continue
                before, after = digest(out / "step_000001"), digest(out / "again" / "step_000001")
                kinds = {name.split(" ")[0] for name in before if " " in name}
                found[toy] = {
                    "differ": [name for name in before if before[name] != after.get(name)],
                    "kinds": sorted(kinds),
                    "num_tensors": len(before),
                }
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def moved(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, toys = tmp_path_factory.mktemp("toys"), {}
    for toy in FAMILY_TOYS:
        model = build_family_toy(toy, seed=3)
        save_toy(model, folder / toy)
        toys[toy] = any(
            hasattr(model.config, key) for key in ("num_experts", "n_routed_experts", "num_local_experts")
        )
    found: dict[str, Any] = world.run(move, {"folder": str(folder), "toys": toys}, size=2, timeout_s=300.0)[0]
    return found


@pytest.mark.parametrize("toy", FAMILY_TOYS)
def test_state_moves_between_layouts_bit_by_bit(moved: dict[str, Any], toy: str) -> None:
    assert moved[toy]["differ"] == []
    assert moved[toy]["kinds"] == ["exp_avg", "exp_avg_sq", "master"]
