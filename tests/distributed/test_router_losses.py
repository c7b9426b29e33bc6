"""Routers' losses and selection biases are their definition in plain torch, and the same under every layout.

The definition is computed by hand from transformers' model (`router_runs.ByHand`): every sample by itself,
without packing or padding. The layouts are compared with one process that has the same microbatches.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtrl.parallel.spec import parse_training_spec
from tests.distributed.router_runs import (
    BIAS,
    NUM_STEPS,
    ROUTERS,
    TOYS,
    ByHand,
    Found,
    load_toy,
    router_section,
    train,
    train_toy,
    write_toys,
)
from tests.distributed.selected import selected
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World

LAYOUTS = (
    "megatron:d2",
    "megatron:t2",
    "megatron:p2",
    "megatron:c2",
    "megatron:(attn:d2|ffn:e2)",
    "megatron:(attn:t2|ffn:e2)",
    "megatron:(attn:p2t2|ffn:e2)",
    "megatron:(attn:d2t2|ffn:t2e2)",
)
ON_BOTH_STACKS = ("megatron:c2", "megatron:(attn:t2|ffn:e2)")
# float32 sums in another order; of an update, Adam's division by small roots makes more of it.
TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE = 1e-6, 1e-5, 1e-5


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    return folder


def train_alone(folder: str) -> dict[str, Found]:
    """In one process: every toy and router, with the microbatches of one and two data parallel ranks; one
    step with those of three, whose division into microbatches is another one.
    """
    cases = [["megatron:d1", 1, toy, toy] for toy in TOYS]
    return {
        f"{toy} {name} {num_dp}": train_toy(
            load_toy(groups, 1, Path(folder) / toy),
            router_section(toy, name),
            num_dp=num_dp,
            num_steps=1 if num_dp == 3 else NUM_STEPS,
        )
        for groups, _, toy, _ in each_case(cases)
        for name in ROUTERS
        for num_dp in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def alone(world: World, toys: Path) -> dict[str, Any]:
    return dict(world.run(train_alone, {"folder": str(toys)}, size=1, timeout_s=240.0)[0])


def names_of(spec: str, toy: str) -> tuple[str, ...]:
    """The routers that a layout is tried with: every router on every layout of two ranks, on one of the
    toys, and every router on every toy.
    """
    if parse_training_spec(spec).world_size > 2:
        return ("microbatch", "global_batch")
    turn = (LAYOUTS.index(spec) + TOYS.index(toy)) % 2
    return [("microbatch", "sequence"), ("global_batch", "frozen")][turn]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, world: World, toys: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    specs = selected(request, "spec")
    for size in sorted({parse_training_spec(spec).world_size for spec in specs}):
        chosen = [spec for spec in specs if parse_training_spec(spec).world_size == size]
        cases = [[spec, 1, toy, f"{spec} {toy}"] for spec in chosen for toy in TOYS]
        arguments = {"folder": str(toys), "cases": cases, "names": [names_of(s, t) for s, _, t, _ in cases]}
        found |= world.run(train, arguments, size=size, timeout_s=400.0)[0]
    return found


@cache
def by_hand(toy: str, name: str, num_dp: int) -> Found:
    return ByHand(toy, name).run(num_dp)


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a tensor's norm, relative to the expected one's."""
    assert set(found) == set(expected)
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-9)) for n in expected)


@pytest.mark.parametrize("num_dp", [1, 2])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("toy", TOYS)
def test_one_process_minimises_the_losses_as_they_are_defined(
    alone: dict[str, Any], toy: str, name: str, num_dp: int
) -> None:
    found, expected = alone[f"{toy} {name} {num_dp}"], by_hand(toy, name, num_dp)
    section = router_section(toy, name)
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE)
    if section.aux_loss != "none":
        assert found["aux_loss"] == pytest.approx(expected["aux_loss"], rel=TOLERANCE)
    if section.z_loss_coeff:
        assert found["z_loss"] == pytest.approx(expected["z_loss"], rel=TOLERANCE)
    gradients = {key: value for key, value in expected["gradients"].items() if key in found["gradients"]}
    assert largest(found["gradients"], gradients) < GRADIENT_TOLERANCE
    assert largest(found["weights"], expected["weights"]) < UPDATE_TOLERANCE


@pytest.mark.parametrize(
    ("spec", "toy", "name"),
    [
        pytest.param(spec, toy, name, marks=[] if spec in ON_BOTH_STACKS else pytest.mark.one_stack)
        for spec in LAYOUTS
        for toy in TOYS
        for name in names_of(spec, toy)
    ],
)
def test_layouts_train_routers_as_one_process_does(
    alone: dict[str, Any], trained: dict[str, Any], spec: str, toy: str, name: str
) -> None:
    num_dp = parse_training_spec(spec).attn.dp
    found, expected = trained[f"{spec} {toy} {name}"], alone[f"{toy} {name} {num_dp}"]
    for key in ("loss", "grad_norm", "aux_loss", "z_loss"):
        if None not in expected[key]:
            assert found[key] == pytest.approx(expected[key], rel=TOLERANCE), key
    biases = {key for key in expected["weights"] if key.endswith(BIAS)}
    assert bool(biases) == (toy == "glm4 moe")
    assert all(torch.equal(found["weights"][key], expected["weights"][key]) for key in biases)
    assert largest(found["weights"], expected["weights"]) < UPDATE_TOLERANCE


@pytest.mark.parametrize("toy", TOYS)
def test_losses_over_samples_or_the_step_do_not_depend_on_the_division(
    alone: dict[str, Any], toy: str
) -> None:
    norms = {name: [alone[f"{toy} {name} {num_dp}"]["grad_norm"][0] for num_dp in (1, 3)] for name in ROUTERS}
    for name in ("sequence", "global_batch"):
        assert norms[name][0] == pytest.approx(norms[name][1], rel=TOLERANCE)
    assert norms["microbatch"][0] != pytest.approx(norms["microbatch"][1], rel=1e-4)


@pytest.mark.parametrize("toy", TOYS)
def test_every_loss_changes_the_gradient(alone: dict[str, Any], toy: str) -> None:
    norms = [alone[f"{toy} {name} 1"]["grad_norm"][0] for name in ROUTERS]
    assert len({round(norm, 5) for norm in norms}) == len(ROUTERS)
