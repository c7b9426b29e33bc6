"""In float64 a layout's loss and gradients are one process's to ten digits: what float32 shows is rounding.

The optimizer is left out, for Megatron keeps its masters in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.parity import LENGTHS, MAX_TOKENS
from tests.distributed.toy_runs import each_case, samples
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save

pytestmark = pytest.mark.one_stack

TOYS = ("qwen3 moe", "deepseek v3", "gpt oss", "olmoe")
SPECS = (
    "megatron:t2",
    "megatron:p2",
    "megatron:c2",
    "megatron:(attn:d2|ffn:e2)",
    "megatron:(attn:t2|ffn:t2)",
)
TOLERANCE = 1e-10


def first_gradients(folder: str, cases: list[list[Any]], write: bool) -> dict[str, list[float]]:
    """On a rank, by case: loss, and the largest error of a box of a gradient relative to its tensor's norm.

    One process writes the reference instead of comparing with it.
    """
    from mtrl.config_engines import OptimizerSection
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf
    from mtrl.models.pieces import read_stored
    from mtrl.objectives import SftLoss
    from mtrl.policy import make_microbatches
    from mtrl.trainer import Trainer

    found: dict[str, list[float]] = {}
    for groups, _, toy, name in each_case(cases):
        path = Path(folder) / toy
        model = build_model(load_model_config(path), groups, precision="fp64")
        load_hf(model, path)
        trainer = Trainer(model, OptimizerSection(lr=1e-3, distributed=False))
        batch = make_microbatches(
            samples(list(LENGTHS[0]), seed=100), model, max_tokens=MAX_TOKENS, pad_token_id=0
        )
        trainer.start_phase(total_steps=1, lr=1e-3, warmup_steps=0)
        parts = trainer.policy.run(batch, SftLoss(), forward_only=False)
        counted = parts if groups.coordinates.tp == 0 else []
        sums = [sum(float(part[key]) for part in counted) for key in ("loss_sum", "num_tokens")]
        totals = torch.tensor(sums, dtype=torch.float64)
        torch.distributed.all_reduce(totals)
        gradients = {key: parameter.main_grad for key, parameter in model.parameters().items()}
        assert all(gradient.dtype == torch.float64 for gradient in gradients.values())
        pieces = [
            simple for piece in model.weight_map.of_rank(groups.rank).pieces for simple in piece.simple()
        ]
        boxes = [(s, read_stored(gradients, s)) for s in pieces if (s.chunk, s.local.name) in gradients]
        if write:
            whole = {simple.hf.name: value.contiguous() for simple, value in boxes}
            save_file(whole, path / "gradients.reference")
        reference = load_file(path / "gradients.reference")
        errors = [
            float((value - reference[s.hf.name][s.stored.slices]).norm() / reference[s.hf.name].norm())
            for s, value in boxes
        ]
        found[name] = [float(totals[0] / totals[1]), max(errors)]
    return found


@pytest.fixture(scope="module")
def compared(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """By case, what each rank found."""
    folder = tmp_path_factory.mktemp("toys")
    for toy in TOYS:
        save(build_family_toy(toy, seed=5), folder / toy)
    found: dict[str, list[list[float]]] = {}
    for size, specs in ((1, ("megatron:d1",)), (2, SPECS)):
        cases = [[spec, 1, toy, f"{spec} {toy}"] for spec in specs for toy in TOYS]
        arguments = {"folder": str(folder), "cases": cases, "write": size == 1}
        for rank in world.run(first_gradients, arguments, size=size):
            for name, value in rank.items():
                found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("toy", TOYS)
def test_loss_and_gradients_are_those_of_one_process(
    compared: dict[str, list[list[float]]], spec: str, toy: str
) -> None:
    expected = compared[f"megatron:d1 {toy}"][0][0]
    for loss, error in compared[f"{spec} {toy}"]:
        assert loss == pytest.approx(expected, rel=TOLERANCE)
        assert error < TOLERANCE
