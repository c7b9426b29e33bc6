"""For every family a push leaves in the engine what full tensors through vLLM's loader leave there, and the
engine then says what transformers says, before and after new weights.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save
from tests.rollout.push_scenarios import num_lacking
from tests.rollout.toys import ENGINE_SIZES, logprob_difference, toy_prompts
from tests.rollout.toys import ENGINE_TOYS as TOYS

pytestmark = pytest.mark.vllm

LOGPROB_TOLERANCE = 1e-5  # float32; the largest seen is 4e-6
PROMPTS = toy_prompts(5, 33, 150)
# What trains with its experts apart samples sliced, and the other way round; families take turns, and
# `make push-matrix` has each under both.
LAYOUTS = (("megatron:(attn:d2|ffn:e2)", "vllm:t2"), ("megatron:(attn:t2|ffn:t2)", "vllm:d2"))
DENSE = (("megatron:d2", "vllm:t2"), ("megatron:t2", "vllm:d2"))


def push_each(folder: str, toys: list[str]) -> dict[str, Any]:
    """By toy and layouts: engine tensors that a push leaves other than a load of full tensors does."""
    found: dict[str, Any] = {}
    for index, toy in enumerate(toys):
        path = Path(folder) / toy
        if dist.get_rank() == 0:
            save(build_family_toy(toy, seed=2, **{**ENGINE_SIZES, **TOYS[toy]}), path)
        dist.barrier()
        found[toy] = push_and_load(path, index % 2)
    return found


def push_and_load(path: Path, number: int) -> dict[str, Any]:
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.gather import TensorGather
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
        path, parse_rollout_spec(rollout), max_model_len=200, max_num_seqs=16, dtype="float32", seed=0,
        kv_cache_bytes=16 << 20,
    )  # fmt: skip
    push = WeightPush(model, engine, torch.float32, num_verified=1)
    differences = []
    for version in (1, 2):
        received = push.run(policy_version=version)
        differences.append(difference(model, engine, path.with_name(f"{path.name} {version}")))
        with torch.no_grad():
            for parameter in model.parameters().values() if version == 1 else ():
                parameter.mul_(0.9)
    pushed = {name: tensor.clone() for name, tensor in engine.destinations.items()}
    names = tuple(model.weight_map.hf_shapes())
    engine.load_weights(TensorGather(model, [names] * 2).run(torch.float32), policy_version=3)
    differ = [name for name, tensor in engine.destinations.items() if not tensor.equal(pushed[name])]
    lacking = 4 * num_lacking(model, engine)
    staged = sorted(push.staging)
    engine.shutdown()
    groups.destroy()
    return {
        "differ": differ, "received": received, "lacking": lacking, "staged": staged,
        "differences": differences,
    }  # fmt: skip


def difference(model: Any, engine: Any, folder: Path) -> float:
    """The largest of a sampled token's log-probability between the engine and transformers; 0 on rank 1."""
    from transformers import AutoModelForCausalLM

    from mtrl.models.hf import export_hf

    sampling = SamplingSettings(
        temperature=1.0, top_p=1.0, max_new_tokens=8, num_samples=2, stop_token_ids=()
    )
    completions = sample_on_all(engine, PROMPTS, sampling, seed=1)
    export_hf(model, folder)
    if dist.get_rank():
        return 0.0
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return logprob_difference(reference, PROMPTS, completions)


@pytest.fixture(scope="module")
def found(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("toys"))
    results: list[dict[str, Any]] = rollout_world.run(
        push_each, {"folder": folder, "toys": list(TOYS)}, size=2, timeout_s=290
    )
    return results


@pytest.mark.parametrize("toy", TOYS)
def test_a_push_leaves_what_a_load_leaves(found: list[dict[str, Any]], toy: str) -> None:
    for rank in found:
        result = rank[toy]
        assert result["differ"] == []
        assert result["received"] == result["lacking"], f"staged: {result['staged']}"


@pytest.mark.parametrize("toy", TOYS)
def test_the_engine_agrees_with_transformers_after_each_push(found: list[dict[str, Any]], toy: str) -> None:
    first, second = found[0][toy]["differences"]
    assert 0 < first <= LOGPROB_TOLERANCE and 0 < second <= LOGPROB_TOLERANCE
