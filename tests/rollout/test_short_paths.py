"""Layers that go straight to their kernels give the bits that vLLM's own way gives."""

from typing import Any

import pytest

from mtrl.rollout import vllm_short_paths
from tests.distributed.world import World
from tests.rollout.scenarios import PROMPTS, SAMPLING, create
from tests.toys import Kind, build_toy, hf_tensors

pytestmark = pytest.mark.vllm

KINDS: tuple[Kind, ...] = ("dense", "moe")


def both_ways(folder: str, spec: str) -> dict[str, Any]:
    """Each kind of model, sampled with the short paths, then without, then with them after new weights."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        engine = create(folder, kind, spec)
        engine.load_weights(hf_tensors(build_toy(kind, seed=0)).items(), policy_version=0)
        layers = dict(engine._model.named_modules())
        shortened = [name for name, layer in layers.items() if "forward" in vars(layer)]
        short = _sampled(engine)
        for name in shortened:
            del layers[name].forward
        own = _sampled(engine)
        again = vllm_short_paths.install(engine._model)
        engine.load_weights(hf_tensors(build_toy(kind, seed=1)).items(), policy_version=0)
        renewed = _sampled(engine)
        for name in shortened:
            del layers[name].forward
        found[kind] = {
            "names": sorted({name.rpartition(".")[2] for name in shortened}),
            "same": short == own and again == shortened,
            "same after new weights": renewed == _sampled(engine),
            "moved": short != renewed,
        }
        engine.shutdown()
    return found


def _sampled(engine: Any) -> list[Any]:
    return [(each.tokens, each.logprobs) for each in engine.generate(PROMPTS, SAMPLING, seed=3)]


@pytest.fixture(scope="module")
def alone(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("short_paths"))
    (result,) = rollout_world.run(both_ways, {"folder": folder, "spec": "vllm:d1"}, size=1, timeout_s=300)
    return dict(result)


@pytest.fixture(scope="module")
def together(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("short_paths"))
    results = rollout_world.run(both_ways, {"folder": folder, "spec": "vllm:t2"}, size=2, timeout_s=300)
    return dict(results[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", ["alone", "together"])
def test_short_paths_give_the_same_tokens_and_the_same_bits(
    request: pytest.FixtureRequest, world: str, kind: Kind
) -> None:
    result = request.getfixturevalue(world)[kind]
    assert result["same"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", ["alone", "together"])
def test_short_paths_read_new_weights(request: pytest.FixtureRequest, world: str, kind: Kind) -> None:
    result = request.getfixturevalue(world)[kind]
    assert result["moved"] and result["same after new weights"]


NORMS = {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}


def test_on_one_rank_every_norm_projection_and_expert_layer_is_short(alone: dict[str, Any]) -> None:
    # vLLM has changed a class when one is missing: the way in vllm_short_paths.py no longer applies.
    assert set(alone["dense"]["names"]) == NORMS | {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(alone["moe"]["names"]) == NORMS | {"qkv_proj", "o_proj", "experts"}


def test_layers_that_add_over_ranks_stay_vllms_own(together: dict[str, Any]) -> None:
    assert set(together["dense"]["names"]) == NORMS | {"qkv_proj", "gate_up_proj"}
    assert set(together["moe"]["names"]) == NORMS | {"qkv_proj"}
