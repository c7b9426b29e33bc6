"""Every family that the engine can hold says what transformers says, before and after new weights."""

from pathlib import Path

import pytest
import torch

from mtrl.parallel.spec import parse_rollout_spec
from mtrl.rollout.protocol import SamplingSettings
from tests.distributed.world import World
from tests.family_toys import build_family_toy, published, save
from tests.rollout.toys import ENGINE_SIZES, logprob_difference, toy_prompts
from tests.rollout.toys import ENGINE_TOYS as TOYS

pytestmark = pytest.mark.vllm

LOGPROB_TOLERANCE = 1e-5  # float32; the largest seen is 3.9e-6


def load_each_twice(folder: str) -> dict[str, list[float]]:
    """On the one rank, by toy: the largest difference of a log-probability after each of two loads."""
    return {toy: load_twice(toy, Path(folder) / toy) for toy in TOYS}


def load_twice(toy: str, folder: Path) -> list[float]:
    from mtrl.rollout.vllm_engine import VllmEngine

    model = build_family_toy(toy, seed=2, **{**ENGINE_SIZES, **TOYS[toy]})
    save(model, folder)
    engine = VllmEngine.create(
        folder, parse_rollout_spec("vllm:d1"), max_model_len=200, max_num_seqs=16, dtype="float32", seed=0,
        kv_cache_bytes=16 << 20,
    )  # fmt: skip
    prompts = toy_prompts(5, 33, 150)
    sampling = SamplingSettings(
        temperature=1.0, top_p=1.0, max_new_tokens=8, num_samples=2, stop_token_ids=()
    )
    found = []
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        engine.load_weights(published(model).items(), policy_version=version)
        found.append(logprob_difference(model, prompts, engine.generate(prompts, sampling, seed=version)))
    engine.shutdown()
    return found


@pytest.fixture(scope="module")
def differences(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = str(tmp_path_factory.mktemp("toys"))
    by_rank: list[dict[str, list[float]]] = rollout_world.run(
        load_each_twice, {"folder": folder}, size=1, timeout_s=280
    )
    return by_rank[0]


@pytest.mark.parametrize("toy", TOYS)
def test_the_engine_agrees_with_transformers_after_each_load(
    differences: dict[str, list[float]], toy: str
) -> None:
    first, second = differences[toy]
    assert first <= LOGPROB_TOLERANCE and second <= LOGPROB_TOLERANCE
