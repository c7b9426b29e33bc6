"""Engines with FP8 weights get, whatever the layouts, the bytes that quantising whole tensors gives.

On CPUs vLLM has no kernels for them, so nothing is sampled here: its real models are built without kernels,
its real loaders recorded, the real push run between real processes.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.world import World
from tests.rollout import fp8_scenarios
from tests.rollout.fp8_scenarios import CASES, ENGINES, TOYS

pytestmark = pytest.mark.vllm

DENSE = ("llama", "qwen2", "qwen3")
NAMED = [(size, case.name) for size, cases in CASES.items() for case in cases]
each_case = pytest.mark.parametrize(("size", "case"), NAMED)
Pushes = Callable[[int], list[Any]]


@pytest.fixture(scope="module")
def recorded(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("recorded"))
    return dict(rollout_world.run(fp8_scenarios.record_fp8, {"folder": folder}, size=1, timeout_s=280)[0])


@pytest.mark.parametrize(("tp", "expert_parallel"), ENGINES)
@pytest.mark.parametrize("toy", TOYS)
def test_vllm_s_loaders_take_every_weight_with_its_scales(
    recorded: dict[str, Any], toy: str, tp: int, expert_parallel: bool
) -> None:
    name = f"{toy} {tp} {expert_parallel}"
    assert (name in recorded) == (toy not in DENSE or not expert_parallel)
    assert recorded.get(name, []) == []


def test_vllm_puts_scales_beside_weights_whose_parts_are_no_whole_blocks(recorded: dict[str, Any]) -> None:
    # Why `check_sliced` refuses it: 32 rows of each of its blocks get the scale of the block before.
    assert recorded["rows of up"] == [480, 4]


def test_other_kernels_than_those_that_keep_the_layout_are_refused(recorded: dict[str, Any]) -> None:
    linear, experts = recorded["other kernels"]
    assert "computes model.layers.1.self_attn.o_proj in FP8 with NoneType" in linear
    assert "mlp.experts" in experts and "Fp8MoeBackend.DEEPGEMM" in experts


@pytest.fixture(scope="module")
def pushes(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> Pushes:
    @functools.cache
    def run(size: int) -> list[Any]:
        folder = str(tmp_path_factory.mktemp("fp8"))
        return rollout_world.run(fp8_scenarios.pushes, {"folder": folder}, size=size, timeout_s=280)

    return run


@each_case
def test_the_engine_holds_the_bytes_of_whole_tensors_quantised(pushes: Pushes, size: int, case: str) -> None:
    for rank in pushes(size):
        assert rank[case]["faults"] == []


@each_case
def test_a_rank_receives_exactly_what_it_lacks(pushes: Pushes, size: int, case: str) -> None:
    for rank in pushes(size):
        found = rank[case]
        assert found["received"] == [found["bound"]] * 2
        assert (found["told"] > 0) <= ("cut" in case)
    assert ("cut" in case) == any(rank[case]["told"] for rank in pushes(size))


@each_case
def test_far_fewer_bytes_travel_than_of_the_weights_themselves(pushes: Pushes, size: int, case: str) -> None:
    received = sum(rank[case]["bound"] for rank in pushes(size))
    usual = sum(pushes(size)[0][case]["unquantised"])
    # Half, or a quarter of float32; embeddings, norms and routers travel as they are, scales besides.
    assert received <= usual * (0.4 if "fp32" in case else 0.7)
