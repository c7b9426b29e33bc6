"""Routers' losses, recomputation and determinism from the config to the files of an SFT run.

A GRPO run's are in test_variants.py.
"""

from pathlib import Path

from tests.distributed.world import World
from tests.e2e.jobs import lines, untimed
from tests.e2e.test_variants import ROUTER, run


def test_an_sft_run_reports_its_routers_and_repeats_bit_for_bit(world: World, toy: Path) -> None:
    options = [ROUTER, "actor.recompute=full", "deterministic=true"]
    first, second = (run(world, toy, name, *options, config="sft") for name in ("router_1", "router_2"))
    records = untimed(lines(first / "metrics.jsonl"))
    keys = [key for key in records[0] if key != "tokens_per_s"]
    assert all(each["router_aux_loss"] >= 0.99 and each["router_z_loss"] > 0 for each in records)
    other = untimed(lines(second / "metrics.jsonl"))
    assert [[each[key] for key in keys] for each in records] == [
        [each[key] for key in keys] for each in other
    ]
    weights = [
        next((folder / "checkpoints").glob("*/model*.safetensors")).read_bytes() for folder in (first, second)
    ]
    assert weights[0] == weights[1]
