"""Experts' weights in the order of kernels on GPUs: a loader writes what vLLM makes of loaded weights.

vLLM's real model and its own conversion; the kernels that multiply are not here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtrl.parallel.errors import RolloutError
from mtrl.parallel.spec import RolloutSpec
from mtrl.rollout.kernel_layout import KernelLayout
from mtrl.rollout.loader_record import record_loader
from mtrl.rollout.vllm_layouts import note_expert_layouts
from mtrl.rollout.weight_loading import WeightLoader
from mtrl.weight_push.kinds import Engines
from tests.distributed.world import World
from tests.rollout import fp8_scenarios, shard_records

pytestmark = pytest.mark.vllm

ENGINES = {"whole": (1, False), "sliced": (2, False), "apart": (2, True)}


def experts_of(model: torch.nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "w13_weight")]


def compute_with(model: torch.nn.Module, kernels: str) -> None:
    """Have experts' layers say that they compute with these kernels."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    for layer in experts_of(model):
        layer.quant_method.unquantized_backend = UnquantizedMoeBackend[kernels]


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """As `WeightLoader.load` on one rank of an engine, whose other ranks need the other experts."""
    assert dist.group.WORLD is not None
    places = WeightLoader(model, torch.float32, dist.group.WORLD).places
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    places.remember(record_loader(model.load_weights, shapes, places.destinations, torch.float32).copies)
    with torch.no_grad():
        for name, weight in weights.items():
            places.replay(name, weight)


def load_in_order(folder: Path, tp: int, expert_parallel: bool, kernels: str) -> dict[str, Any]:
    """Of every rank, which layouts were noted, and whether its weights are vLLM's after conversion."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import convert_to_unquantized_kernel_format

    config = fp8_scenarios.write_config(folder, "qwen3 moe")
    engines = Engines(spec=RolloutSpec(backend="vllm", tp=tp), expert_parallel=expert_parallel)
    weights = {name: torch.randn(shape) for name, shape in shard_records.shapes_of(config).items()}
    layouts: set[str] = set()
    found: dict[str, Any] = {"equal": [], "moved": []}
    for rank in range(tp):
        ((reference, _),) = shard_records.shard_models(folder, engines, [rank])
        reference.load_weights(weights.items())
        ((model, _),) = shard_records.shard_models(folder, engines, [rank])
        compute_with(model, kernels)
        note_expert_layouts(model)
        load(model, weights)
        for expected, layer in zip(experts_of(reference), experts_of(model), strict=True):
            plain = expected.w13_weight.data, expected.w2_weight.data
            method = layer.quant_method
            made = convert_to_unquantized_kernel_format(method.unquantized_backend, method.moe, *plain)
            found["equal"] += [layer.w13_weight.equal(made[0]), layer.w2_weight.equal(made[1])]
            found["moved"].append(not layer.w13_weight.equal(plain[0]))
            noted = [getattr(each, "kernel_layout", None) for each in (layer.w13_weight, layer.w2_weight)]
            layouts.add(str(noted))
    return found | {"layouts": sorted(layouts)}


def loads(folder: str) -> dict[str, Any]:
    shard_records.prepare()
    found: dict[str, Any] = {
        f"{name} {kernels}": load_in_order(Path(folder), tp, expert_parallel, kernels)
        for name, (tp, expert_parallel) in ENGINES.items()
        for kernels in ("FLASHINFER_CUTLASS", "TRITON")
    }
    engines = Engines(spec=RolloutSpec(backend="vllm"))
    ((model, _),) = shard_records.shard_models(Path(folder), engines, [0])
    compute_with(model, "FLASHINFER_TRTLLM")
    try:
        note_expert_layouts(model)
    except RolloutError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(rollout_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("layouts"))
    return dict(rollout_world.run(loads, {"folder": folder}, size=1, timeout_s=120)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_gates_and_ups_that_change_places_are_written_so(found: dict[str, Any], engine: str) -> None:
    result = found[f"{engine} FLASHINFER_CUTLASS"]
    assert result["equal"] and all(result["equal"]) and all(result["moved"])
    assert result["layouts"] == [str([KernelLayout(swapped=True), None])]


@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_that_take_weights_as_they_are_need_no_layout(found: dict[str, Any], engine: str) -> None:
    result = found[f"{engine} TRITON"]
    assert all(result["equal"]) and not any(result["moved"]) and result["layouts"] == ["[None, None]"]


def test_kernels_of_another_order_are_refused_by_name(found: dict[str, Any]) -> None:
    assert "with FlashInfer TRTLLM, which keeps w13_weight in an order" in found["refused"]
    assert "write rollout.moe_backend=triton" in found["refused"]
