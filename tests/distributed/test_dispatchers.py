"""How tokens travel to experts changes no number: Megatron's dispatchers on five layouts against alltoall."""

from pathlib import Path
from typing import Any

import pytest

from mtrl.parallel.spec import parse_training_spec
from tests.distributed.router_runs import Found, open_trainer, router_section, whole_weights
from tests.distributed.selected import selected
from tests.distributed.toy_runs import batch, microbatches
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save

WAYS: dict[str, dict[str, Any]] = {
    "alltoall": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "shared expert overlap": {"moe_shared_expert_overlap": True},
}
LAYOUTS = (
    "megatron:(attn:d2|ffn:e2)",
    "megatron:(attn:t2|ffn:e2)",
    "megatron:(attn:t2|ffn:t2)",
    "megatron:(attn:d2t2|ffn:t2e2)",
    "megatron:(attn:p2t2|ffn:e2)",
)
TOY = "glm4 moe"  # shared experts, a dense layer, a selection bias
CLOSE = 1e-6


OVERLAPPED = {"megatron:(attn:d2|ffn:e2)": 1, "megatron:(attn:p2t2|ffn:e2)": 2}
"""Layouts, and model chunks a stage, in which one microbatch's tokens travel while another's are computed."""


def train(folder: str, specs: list[str]) -> dict[str, Found]:
    """On a rank: two steps in every way, with losses of routers; and in bf16, with and without overlap."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout

    found: dict[str, Found] = {}
    for spec in specs:
        groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(spec)))
        parallel_groups.seed_everything(1, groups)
        for way, fields in WAYS.items():
            model = build_model(load_model_config(Path(folder)), groups, **fields)
            found[f"{spec} {way}"] = steps_of(model, folder, router_section(TOY, "sequence"))
        parallel_groups.destroy()
        if spec not in OVERLAPPED:
            continue
        groups = parallel_groups.create(
            RankLayout.from_spec(parse_training_spec(spec)), virtual_pipeline_size=OVERLAPPED[spec]
        )
        parallel_groups.seed_everything(1, groups)
        for overlap in (False, True):
            model = build_model(
                load_model_config(Path(folder)),
                groups,
                precision="bf16",
                num_chunks=OVERLAPPED[spec],
                overlap_moe_expert_parallel_comm=overlap,
            )
            plans = count_plans(model)
            found[f"{spec} overlap {overlap}"] = steps_of(model, folder, None) | {"plans": len(plans)}
        parallel_groups.destroy()
    return found


def steps_of(model: Any, folder: str, router: Any) -> Found:
    """On a rank: two steps from the toy's weights."""
    from mtrl.models.hf import load_hf
    from mtrl.objectives import SftLoss

    load_hf(model, Path(folder))
    trainer = open_trainer(model, router)
    steps = [trainer.step(microbatches(model, batch(n)), SftLoss()) for n in range(2)]
    layers = [module for chunk in model.chunks for module in chunk.modules()]
    dispatchers = [each.token_dispatcher for each in layers if hasattr(each, "token_dispatcher")]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "dispatchers": sorted({type(each).__name__ for each in dispatchers}),
        "overlap": [each.shared_experts is not None for each in dispatchers],
        "weights": whole_weights(model),
    }


def count_plans(model: Any) -> list[object]:
    """A list that grows with every microbatch that a chunk is asked to plan instead of to compute."""
    plans: list[object] = []
    for chunk in model.chunks:
        original = chunk.build_schedule_plan

        def planned(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            plans.append(None)
            return original(*args, **kwargs)

        chunk.build_schedule_plan = planned
    return plans


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toys") / "toy"
    save(build_family_toy(TOY, seed=1), folder)
    found: dict[str, Any] = {}
    specs = selected(request, "spec")
    for size in sorted({parse_training_spec(spec).world_size for spec in specs}):
        chosen = [spec for spec in specs if parse_training_spec(spec).world_size == size]
        found |= world.run(train, {"folder": str(folder), "specs": chosen}, size=size, timeout_s=240.0)[0]
    return found


ON_BOTH_STACKS = LAYOUTS[1]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "alltoall"])
@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=[] if s == ON_BOTH_STACKS else [pytest.mark.one_stack]) for s in LAYOUTS],
)
def test_dispatchers_agree(trained: dict[str, Any], spec: str, way: str) -> None:
    found, expected = trained[f"{spec} {way}"], trained[f"{spec} alltoall"]
    assert expected["dispatchers"] == ["MoEAlltoAllTokenDispatcher"]
    assert (found["dispatchers"] == ["MoEAllGatherTokenDispatcher"]) == (way == "allgather")
    assert all(overlaps == (way == "shared expert overlap") for overlaps in found["overlap"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=CLOSE)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=CLOSE)
    pairs = [(value, expected["weights"][key]) for key, value in found["weights"].items()]
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs) < CLOSE


@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=[pytest.mark.one_stack] if OVERLAPPED[s] > 1 else []) for s in OVERLAPPED],
)
def test_overlapping_two_microbatches_changes_no_bit(trained: dict[str, Any], spec: str) -> None:
    found, expected = trained[f"{spec} overlap True"], trained[f"{spec} overlap False"]
    assert expected["plans"] == 0 < found["plans"]
    assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    assert all(found["weights"][key].equal(value) for key, value in expected["weights"].items())
