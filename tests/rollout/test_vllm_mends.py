"""Each mend of vLLM is still needed, and what it holds on to is still there.

All of it is asked in one process whose vLLM is as installed, with no mend applied. When a test here fails,
vLLM has changed: drop the mend, or write it anew.
"""

import importlib
import inspect
import os
from typing import Any

import pytest

from mtrl.parallel.errors import RolloutError
from mtrl.rollout import vllm_mends, vllm_process
from tests.distributed.world import World

pytestmark = pytest.mark.vllm


def unmended() -> dict[str, Any]:
    """World of one: how vLLM behaves as installed."""
    vllm_process.prepare_environment()
    vllm_process.quiet_log()
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return {
        "compiled": _compiled(),
        "linear": _linear(),
        "experts": _experts(),
        "rotated heads": [_num_rotated(is_flat) for is_flat in (False, True)],
        "shared memory": _segment_name(),
        "inspection": _inspection(),
        "binding": _binding(),
        "private": _missing(),
        "reserved": _torch_changes(),
    }


def _compiled() -> list[bool]:
    return [
        hasattr(getattr(importlib.import_module(module), name), "_torchdynamo_orig_callable")
        for module, name in vllm_mends.COMPILED_FUNCTIONS
    ]


def _linear() -> dict[str, Any]:
    import torch
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    x = torch.ones(2, 64)
    emptied = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    dispatch_cpu_unquantized_gemm(emptied, remove_weight=True)
    kept = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    dispatch_cpu_unquantized_gemm(kept, remove_weight=False)
    before = kept.cpu_linear(x, kept.weight, None)  # type: ignore[operator]
    kept.weight.mul_(3)
    stale = torch.equal(before, kept.cpu_linear(x, kept.weight, None))  # type: ignore[operator]
    return {"weight is emptied": emptied.weight.numel() == 0, "copy is stale": stale}


def _num_rotated(is_flat: bool) -> int:
    """How many of four heads are rotated in every token, given as [token, head, dim] or as a row a token."""
    import torch
    from vllm import _custom_ops as ops

    num_tokens, heads, dim = 2, 4, 64
    angles = torch.ones(8, dim // 2)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    query = torch.ones(num_tokens, heads, dim)
    given = query.flatten(1) if is_flat else query
    ops.rotary_embedding(torch.arange(num_tokens), given, None, dim, cache, True)
    changed = given.view(num_tokens, heads, dim) != 1.0
    return int(changed.any(-1).all(0).sum())


def _experts() -> dict[str, Any]:
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(torch.randn(2, 64, 64), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(torch.randn(2, 64, 32), requires_grad=False)
    loaded = layer.w13_weight.clone()
    experts = CPUUnquantizedExperts.__new__(CPUUnquantizedExperts)
    experts._use_zentorch = False
    experts.quant_config = type("NoBias", (), {"w1_bias": None, "w2_bias": None})()
    experts.moe_config = type(
        "Config", (), {"intermediate_size_per_partition": 32, "activation": MoEActivation.SILU}
    )()
    CPUUnquantizedExperts.process_weights_after_loading(experts, layer)

    def run(expert_map: Any) -> Any:
        output = torch.empty(3, 64)
        CPUUnquantizedExperts.apply(
            experts, output, torch.ones(3, 64), layer.w13_weight, layer.w2_weight, torch.ones(3, 1),
            torch.zeros(3, 1, dtype=torch.int32), MoEActivation.SILU, 2, expert_map, None, None, None, None,
            None, False,
        )  # fmt: skip
        return output

    swapped = run(torch.tensor([1, 0], dtype=torch.int32))
    return {
        "parameter is packed in place": not torch.equal(loaded, layer.w13_weight),
        "map is ignored": torch.equal(run(None), swapped),
    }


def _segment_name() -> str:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    # What the worker sets it to under the external launcher: the end of "env://".
    os.environ["VLLM_DIST_IDENT"] = "//"
    communicator = type("Communicator", (), {"unique_name": "tp:0", "ranks": [0, 1]})()
    return str(_CPUSHMDistributed.make_group_name(communicator))


def _inspection() -> str:
    from vllm.model_executor.models import registry

    return inspect.getsource(registry._run_in_subprocess)


def _binding() -> str:
    from vllm.v1.worker.cpu_worker import CPUWorker

    return inspect.getsource(CPUWorker.__init__)


def _torch_changes() -> list[str]:
    # Importing the worker is what changes torch; `_binding` did.
    from vllm.v1.worker.cpu_worker import CPUWorker

    changed = ["set_num_threads"] if "torch.set_num_threads =" in inspect.getsource(CPUWorker) else []
    for owner, name in vllm_process._TORCH_NAMES:
        if getattr(vars(owner).get(name), "__module__", "").startswith("vllm."):
            changed.append(name)
    return changed


PRIVATE = (
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm(layer, remove_weight)",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:"
    "CPUUnquantizedExperts.process_weights_after_loading(self, layer)",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply(self, output, "
    "hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, a1q_scale, "
    "a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input)",
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed.make_group_name(communicator)",
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm(self)",
    "vllm.distributed.parallel_state:get_tp_group()",
    "vllm.distributed.parallel_state:destroy_model_parallel()",
    "vllm.distributed.parallel_state:GroupCoordinator.destroy(self)",
    "vllm.model_executor.models.registry:_run_in_subprocess(fn)",
    "vllm.v1.engine.llm_engine:LLMEngine.step(self)",
    "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests(self)",
    "vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher._distributed_args(self)",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.get_model(self)",
)
"""Private functions that the engine and its mends call or replace, with the parameters they count on."""


def _missing() -> list[str]:
    found = []
    for entry in PRIVATE:
        path, parameters = entry.removesuffix(")").split("(")
        module, _, name = path.partition(":")
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part, None)
        actual = ", ".join(inspect.signature(value).parameters) if callable(value) else "absent"
        if actual != parameters:
            found.append(f"{path}({actual})")
    return found


@pytest.fixture(scope="module")
def findings(rollout_world: World) -> dict[str, Any]:
    (found,) = rollout_world.run(unmended, size=1, timeout_s=200)
    return dict(found)


def test_run_uncompiled_is_needed(findings: dict[str, Any]) -> None:
    assert findings["compiled"] == [True] * len(vllm_mends.COMPILED_FUNCTIONS)


def test_keep_linear_weights_live_is_needed(findings: dict[str, Any]) -> None:
    assert findings["linear"] == {"weight is emptied": True, "copy is stale": True}


def test_rotate_every_head_is_needed(findings: dict[str, Any]) -> None:
    in_heads, in_rows = findings["rotated heads"]
    assert in_heads < in_rows == 4


def test_mend_cpu_experts_is_needed(findings: dict[str, Any]) -> None:
    assert findings["experts"] == {"parameter is packed in place": True, "map is ignored": True}


def test_own_shared_memory_is_needed(findings: dict[str, Any]) -> None:
    # Ranks and nothing else: every job of the machine calls its segments so.
    assert findings["shared memory"] == "//-tp:0-[0-1]-cpushm"


def test_inspect_models_here_is_needed(findings: dict[str, Any]) -> None:
    assert "subprocess.run(" in findings["inspection"]


def test_leave_memory_unbound_is_needed(findings: dict[str, Any]) -> None:
    assert "torch.ops._C.init_cpu_memory_env(" in findings["binding"]


def test_vllm_still_changes_torch(findings: dict[str, Any]) -> None:
    wanted = {name for _, name in vllm_process._TORCH_NAMES}
    assert set(findings["reserved"]) == wanted


def test_private_functions_have_the_parameters_that_are_counted_on(findings: dict[str, Any]) -> None:
    assert findings["private"] == []


def test_each_mend_says_what_it_changes_and_why() -> None:
    names = [mend.name for mend in vllm_mends.MENDS]
    assert len(set(names)) == len(names)
    for mend in vllm_mends.MENDS:
        assert mend.versions == vllm_process.VLLM_VERSION
        assert mend.link.startswith("https://github.com/vllm-project/vllm/") and mend.why
        assert f"def test_{mend.name}_is_needed" in inspect.getsource(importlib.import_module(__name__))


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "VLLM_VERSION", "0.31")
    with pytest.raises(RolloutError, match=r"0\.32\.0 is installed.*0\.31\.x"):
        vllm_mends.install()
