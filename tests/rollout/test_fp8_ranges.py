"""The ranges that pushes to FP8 engines are scored by are what vLLM's own loaders read, scales among them."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.world import World
from tests.rollout import fp8_scenarios, shard_records
from tests.rollout.fp8_scenarios import TOYS

pytestmark = pytest.mark.vllm

# Trainer, size of an engine, expert parallelism; two engines, on nodes of three ranks.
PUSHES = (
    ("megatron:t2", 1, False),
    ("megatron:(attn:p2d2|ffn:e2)", 2, False),
    ("megatron:(attn:d2t2|ffn:e4)", 2, True),
)
GPUS_PER_NODE = 3


def compare_pushes(folder: str) -> dict[str, Any]:
    """By toy and push, as `compare_push`."""
    shard_records.prepare()
    return {
        f"{toy} {spec}": compare_push(Path(folder) / toy, toy, spec, tp, expert_parallel)
        for toy in TOYS
        for spec, tp, expert_parallel in PUSHES
    }


def compare_push(folder: Path, toy: str, spec: str, tp: int, expert_parallel: bool) -> dict[str, Any]:
    """Of which tensors the record of a loader and the ranges differ; and bytes that ranks and nodes receive,
    by the plan that a push makes of the records, and by the score.
    """
    from mtrl.models.backends.torch_native.places import places
    from mtrl.models.weight_map import WeightMap
    from mtrl.parallel.spec import RolloutSpec
    from mtrl.rollout.fp8_weights import fp8_names
    from mtrl.weight_push.fp8_kinds import Fp8Kinds
    from mtrl.weight_push.kinds import Engines
    from mtrl.weight_push.plan import Needs, plan_push
    from mtrl.weight_push.score import score
    from tests.unit.test_push_fp8_score import bytes_of, sizes_of
    from tests.unit.test_push_kinds import by_rank, trainer

    config = fp8_scenarios.write_config(folder, toy)
    layout, stages, _ = trainer(config, spec, 1)
    engines = Engines(
        spec=RolloutSpec(backend="vllm", dp=2, tp=tp),
        expert_parallel=expert_parallel and config.moe is not None,
    )
    kinds = Fp8Kinds.of(config, layout, stages, 2)(engines)
    records = [
        fp8_scenarios._recorded(model, destinations, config)
        for model, destinations in shard_records.shard_models(folder, engines, range(tp), "fp8")
    ]
    ruled = by_rank(kinds, layout, engines, "need")
    need = [Needs.of(records[rank % tp]).boxes for rank in range(layout.world_size)]
    node_of = [rank // GPUS_PER_NODE for rank in range(layout.world_size)]
    weight_map = WeightMap(config=config, layout=layout, stages=stages, places=places(config))
    names = fp8_names(config)
    plan = plan_push(weight_map, need, node_of, fp8=names)
    bound = score(kinds, layout, engines, GPUS_PER_NODE)
    return {
        "differing": [
            name
            for record, own in zip(records, ruled[:tp], strict=True)
            for name in shard_records.differing(record, own, dict(record.sources))
        ],
        "planned": list(bytes_of(plan, sizes_of(weight_map, names), node_of)),
        "scored": [bound.received.tolist(), bound.into_nodes.tolist()],
    }


@pytest.fixture(scope="module")
def found(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("fp8"))
    return dict(rollout_world.run(compare_pushes, {"folder": folder}, size=1, timeout_s=280)[0])


each_push = pytest.mark.parametrize("spec", [spec for spec, _, _ in PUSHES])
each_toy = pytest.mark.parametrize("toy", TOYS)


@each_push
@each_toy
def test_the_ranges_are_what_the_loader_reads(found: dict[str, Any], toy: str, spec: str) -> None:
    assert found[f"{toy} {spec}"]["differing"] == []


@each_push
@each_toy
def test_the_score_is_what_a_push_of_the_records_moves(found: dict[str, Any], toy: str, spec: str) -> None:
    result = found[f"{toy} {spec}"]
    assert sum(map(sum, result["planned"])) > 0
    assert result["planned"] == result["scored"]
