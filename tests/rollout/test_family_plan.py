"""For every family a planned push leaves in the engine what full tensors through vLLM's loader leave
there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save
from tests.rollout.toys import ENGINE_SIZES
from tests.rollout.toys import ENGINE_TOYS as TOYS

pytestmark = pytest.mark.vllm

# What trains with its experts apart samples sliced, and the other way round.
LAYOUTS = (("megatron:(attn:d2|ffn:e2)", "vllm:t2"), ("megatron:(attn:t2|ffn:t2)", "vllm:d2"))
DENSE = (("megatron:d2", "vllm:t2"), ("megatron:t2", "vllm:d2"))


def push_each(folder: str, toys: list[str]) -> dict[str, Any]:
    """By toy and layouts: engine tensors that a push leaves other than a load of full tensors does."""
    found: dict[str, Any] = {}
    for toy in toys:
        for number in range(2):
            path = Path(folder) / f"{toy} {number}"
            if dist.get_rank() == 0:
                save(build_family_toy(toy, seed=2, **{**ENGINE_SIZES, **TOYS[toy]}), path)
            dist.barrier()
            found[f"{toy} {number}"] = push_and_load(path, number)
    return found


def push_and_load(path: Path, number: int) -> dict[str, Any]:
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.gather import TensorGather, held_boxes
    from mtrl.models.hf import load_hf
    from mtrl.parallel import groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.rollout.vllm_engine import VllmEngine
    from mtrl.weight_push.push import WeightPush

    config = load_model_config(path)
    actor, rollout = (LAYOUTS if config.moe else DENSE)[number]
    if config.family == "gpt_oss":
        rollout = "vllm:d2"  # vLLM's CPU build slices no experts that have biases
    parallel = groups.create(RankLayout.from_spec(parse_training_spec(actor)))
    groups.seed_everything(1, parallel)
    model = build_model(config, parallel)
    load_hf(model, path)
    engine = VllmEngine.create(
        path, parse_rollout_spec(rollout), max_model_len=64, max_num_seqs=8, dtype="float32", seed=0,
        kv_cache_bytes=16 << 20,
    )  # fmt: skip
    push = WeightPush(model, engine, torch.float32, num_verified=1)
    received = push.run(policy_version=1)
    pushed = {name: tensor.clone() for name, tensor in engine.destinations.items()}
    names = tuple(model.weight_map.hf_shapes())
    engine.load_weights(TensorGather(model, [names] * 2).run(torch.float32), policy_version=2)
    differ = [name for name, tensor in engine.destinations.items() if not tensor.equal(pushed[name])]
    record, held = engine.loader_record, held_boxes(model.weight_map)[dist.get_rank()]
    assert record is not None
    lacking = 0
    for name, shape in model.weight_map.hf_shapes().items():
        lacks = torch.zeros(shape, dtype=torch.bool)
        for copy in record.copies:
            if copy.source == name:
                is_box = copy.source_region.box(shape) is not None
                copy.source_region.of(lacks).fill_(True) if is_box else lacks.fill_(True)
        for box in held.get(name, ()):
            lacks[box.slices] = False
        lacking += 4 * int(lacks.sum())
    staged = sorted(push.staging)
    engine.shutdown()
    groups.destroy()
    return {"differ": differ, "received": received, "lacking": lacking, "staged": staged}


@pytest.fixture(scope="module")
def found(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("toys"))
    results: list[dict[str, Any]] = rollout_world.run(
        push_each, {"folder": folder, "toys": list(TOYS)}, size=2, timeout_s=290
    )
    return results


@pytest.mark.parametrize("number", range(2), ids=["apart to sliced", "sliced to whole"])
@pytest.mark.parametrize("toy", TOYS)
def test_a_push_leaves_what_a_load_leaves(found: list[dict[str, Any]], toy: str, number: int) -> None:
    for rank in found:
        result = rank[f"{toy} {number}"]
        assert result["differ"] == []
        assert result["received"] == result["lacking"], f"staged: {result['staged']}"
