"""The ranges that pushes are scored by are what vLLM's own loaders read, for every family and engine size."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtrl.parallel.spec import RolloutSpec
from tests.distributed.world import World
from tests.rollout import shard_records
from tests.rollout.shard_records import engine_needs
from tests.rollout.toys import ENGINE_TOYS as LATENT
from tests.unit.test_family_configs import written

pytestmark = pytest.mark.vllm

SIZES: dict[str, Any] = {
    "vocab_size": 250, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
TOYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {},
    # Their vLLM models take head_dim to be hidden_size / num_attention_heads, whatever the config says.
    "qwen2": {"head_dim": 16},
    "qwen2 moe": {"head_dim": 16},  # a dense layer among mixtures
    "qwen3": {},
    "qwen3 moe": {"num_experts": 10},  # which four ranks cannot share evenly
    "mixtral": {},
    "olmoe": {"num_attention_heads": 4},
    "glm4 moe": {},
    "gpt oss": {"num_key_value_heads": 4, "rope_parameters": LATENT["gpt oss"]["rope_parameters"]},
    "moonlight": {**LATENT["moonlight"], "num_key_value_heads": 8},
    "deepseek v3": {**LATENT["deepseek v3"], "num_key_value_heads": 8},
}
ENGINES = ((1, False), (2, False), (4, False), (8, False), (2, True), (4, True))


def write(folder: Path) -> None:
    for toy, fields in TOYS.items():
        (folder / toy).mkdir()
        (folder / toy / "config.json").write_text(json.dumps(written(toy, **{**SIZES, **fields})))


def compare_shards(folder: str) -> dict[str, Any]:
    """By toy and engine: what differs on any of its ranks, or why there is no such engine."""
    from mtrl.models.families import load_model_config
    from mtrl.parallel.errors import LayoutError
    from mtrl.weight_push.kinds import Engines

    shard_records.prepare()
    found: dict[str, Any] = {}
    for toy in TOYS:
        config = load_model_config(Path(folder) / toy)
        shapes = shard_records.shapes_of(config)
        for tp, expert_parallel in ENGINES:
            engines = Engines(spec=RolloutSpec(backend="vllm", dp=2, tp=tp), expert_parallel=expert_parallel)
            try:
                ruled = shard_records.ruled_needs(config, engines)
            except LayoutError as error:
                found[f"{toy} {tp} {expert_parallel}"] = str(error)
                continue
            records = list(shard_records.record_shards(Path(folder) / toy, engines, shapes))
            found[f"{toy} {tp} {expert_parallel}"] = [
                name
                for record, own in zip(records, ruled, strict=True)
                for name in shard_records.differing(record, own, shapes)
            ]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("toys")
    write(path)
    return str(path)


@pytest.fixture(scope="module")
def found(rollout_world: World, folder: str) -> dict[str, Any]:
    return dict(rollout_world.run(compare_shards, {"folder": folder}, size=1, timeout_s=280)[0])


REFUSED = {
    **{
        f"{toy} {tp} True": "has no experts"
        for toy in ("llama", "llama tied", "qwen2", "qwen3")
        for tp in (2, 4)
    },
    "olmoe 8 False": "attention heads 4 cannot be split by t8",
    **{f"gpt oss {tp} False": "use expert parallelism" for tp in (2, 4, 8)},
}


@pytest.mark.parametrize(("tp", "expert_parallel"), ENGINES)
@pytest.mark.parametrize("toy", TOYS)
def test_the_ranges_are_what_the_loader_reads(
    found: dict[str, Any], toy: str, tp: int, expert_parallel: bool
) -> None:
    name = f"{toy} {tp} {expert_parallel}"
    if name in REFUSED:
        assert REFUSED[name] in found[name]
    else:
        assert found[name] == []


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["sliced", "apart"])
def test_they_are_what_a_real_engine_s_ranks_record(
    rollout_world: World, folder: str, expert_parallel: bool
) -> None:
    toys = ["qwen3 moe", "deepseek v3"] + ([] if expert_parallel else ["llama tied"])
    rollout = {"dp": 1, "tp": 2, "expert_parallel": expert_parallel}
    for rank in rollout_world.run(
        engine_needs, {"folder": folder, "toys": toys, "rollout": rollout}, size=2, timeout_s=200
    ):
        assert rank == {toy: [] for toy in toys}
