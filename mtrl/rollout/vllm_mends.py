"""Every change mtrl makes to vLLM, each with its place upstream, its reason and the versions it is for.

`install` is called before the engine is built. Each mend has a test that fails when vLLM no longer needs
it, and each private name used here one that fails when it is gone. All of them concern the CPU build: on
CUDA nothing is changed.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.errors import RolloutError
from mtrl.rollout.kernel_layout import KernelLayout, find_layout
from mtrl.rollout.vllm_process import check_version

_SOURCE = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/"
_SHM_FOLDER = Path("/dev/shm")

DERIVED_PARAMETERS = (".W_UV", ".W_UK_T")
"""Latent attention's absorbed projections: parameters that no weight is loaded into but that are computed."""

EXPERT_WEIGHTS = ("w13_weight", "w2_weight")

COMPILED_FUNCTIONS = (
    ("vllm.v1.sample.ops.logprobs", "batched_count_greater_than"),
    ("vllm.v1.sample.sampler", "batched_count_greater_than"),
    ("vllm.v1.sample.ops.topk_topp_sampler", "compiled_random_sample"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "get_masked_input_and_mask"),
)
"""What vLLM compiles on CPU even when told to run eagerly, in each module that holds a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """A change to vLLM: ``versions`` are those it was checked with, ``link`` leads to what it changes."""

    name: str
    link: str
    versions: str
    why: str
    apply: Callable[[], None]


def _run_uncompiled() -> None:
    import importlib

    for module_name, function_name in COMPILED_FUNCTIONS:
        module = importlib.import_module(module_name)
        compiled = getattr(module, function_name)
        setattr(module, function_name, getattr(compiled, "_torchdynamo_orig_callable", compiled))


def _keep_linear_weights_live() -> None:
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
            original(layer, remove_weight)
            return
        # A plain function of the weight that is passed in on each call: nothing can go stale.
        object.__setattr__(layer, "cpu_linear", torch.nn.functional.linear)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _mend_cpu_experts() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original_pack = CPUUnquantizedExperts.process_weights_after_loading
    original_apply = CPUUnquantizedExperts.apply

    def pack(self: Any, layer: torch.nn.Module) -> None:
        size = self.moe_config.intermediate_size_per_partition
        if hasattr(layer, "w13_bias") and self._padded_intermediate_size(self.moe_config) != size:
            raise RolloutError(
                f"vLLM pads experts with biases on CPU, of {size} to a multiple of 32, and updates would "
                "miss the padded copy; use fewer tensor parallel ranks"
            )
        if hasattr(layer.w13_weight, "kernel_layout"):
            return
        # vLLM's own packing runs on a stand-in, so that the layer's parameters stay what they are.
        packed = torch.nn.Module()
        for name in EXPERT_WEIGHTS:
            live = getattr(layer, name)
            setattr(packed, name, torch.nn.Parameter(live.data, requires_grad=False))
        original_pack(self, packed)
        self.mtrl_packed = packed
        layouts = [
            _kernel_layout(getattr(layer, name), getattr(packed, name), self.isa) for name in EXPERT_WEIGHTS
        ]
        if all(layouts):
            # One tensor, in the kernel's order: `weight_loading` writes new weights to where this says.
            for name, layout in zip(EXPERT_WEIGHTS, layouts, strict=True):
                getattr(layer, name).data = getattr(packed, name).data
                getattr(layer, name).kernel_layout = layout

    def apply(
        self: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor,
        topk_ids: Tensor, activation: Any, global_num_experts: int, expert_map: Tensor | None, *rest: Any,
        **named: Any,
    ) -> None:  # fmt: skip
        if expert_map is not None:
            local = expert_map[topk_ids.long()].to(topk_ids.dtype)
            absent = local < 0
            # Experts of other ranks: any local one, weighted with nothing.
            topk_ids = local.masked_fill(absent, 0)
            topk_weights = topk_weights.masked_fill(absent, 0.0)
        packed = self.mtrl_packed
        original_apply(
            self, output, hidden_states, packed.w13_weight, packed.w2_weight, topk_weights, topk_ids,
            activation, global_num_experts, None, *rest, **named,
        )  # fmt: skip

    CPUUnquantizedExperts.process_weights_after_loading = pack
    CPUUnquantizedExperts.apply = apply


def _kernel_layout(live: Tensor, packed: Tensor, isa: str) -> KernelLayout | None:
    """How the experts' kernel keeps its weights; None where they were padded too, or in another way."""
    return _packed_layout(isa, tuple(live.shape[1:]), live.dtype) if live.shape == packed.shape else None


@cache
def _packed_layout(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> KernelLayout | None:
    """Probed once for all layers of a model."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    return find_layout(lambda matrix: cpu_prepack_moe_weight(matrix, isa), shape, dtype)


def _rotate_every_head() -> None:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        flat = [None if x is None else x.reshape(x.shape[0], -1) for x in (query, key)]
        rotated_query, rotated_key = original(self, positions, *flat)
        return rotated_query.view(query.shape), None if key is None else rotated_key.view(key.shape)

    RotaryEmbedding.forward_cpu = forward_cpu


def _own_shared_memory() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original_init = _CPUSHMDistributed._init_cpu_shm

    def make_group_name(communicator: Any) -> str:
        ranks = "-".join(str(rank) for rank in communicator.ranks)
        return f"mtrl-{os.environ['MTRL_JOB_TOKEN']}-{communicator.unique_name}-{ranks}"

    def init_cpu_shm(self: Any) -> int:
        handle: int = original_init(self)
        # Every rank has mapped every segment by now (there is a barrier), so the names can go at once:
        # then no crash, however sudden, leaves any behind.
        (_SHM_FOLDER / f"{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
        return handle

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
    _CPUSHMDistributed._init_cpu_shm = init_cpu_shm


def _inspect_models_here() -> None:
    from vllm.model_executor.models import registry

    def run_here(function: Callable[[], Any]) -> Any:
        return function()

    registry._run_in_subprocess = run_here


def _leave_memory_unbound() -> None:
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()

    def leave_unbound(nodes: list[int]) -> None:
        """Bind nothing: the process is the trainer's."""

    # An attribute set on the namespace of operators hides the operator from Python callers only.
    vars(torch.ops._C)["init_cpu_memory_env"] = leave_unbound


MENDS: tuple[Mend, ...] = (
    Mend(
        name="run_uncompiled",
        link=_SOURCE + "v1/sample/ops/logprobs.py",
        versions="0.32",
        why="functions of a few pointwise operations are compiled at their first call, which makes the first "
        "sampling wait 2 to 17 s",
        apply=_run_uncompiled,
    ),
    Mend(
        name="keep_linear_weights_live",
        link=_SOURCE + "model_executor/layers/utils.py",
        versions="0.32",
        why="linear weights are packed for oneDNN and then emptied, so that new weights have nowhere to go, "
        "and a tied lm_head keeps a packed copy that no update reaches; without packing it is as fast",
        apply=_keep_linear_weights_live,
    ),
    Mend(
        name="mend_cpu_experts",
        link=_SOURCE + "model_executor/layers/fused_moe/experts/cpu_moe.py",
        versions="0.32",
        why="expert weights are packed in place once, updates then written there in the order of files "
        "(silently wrong), and the map of expert parallelism is ignored (reads beyond the weights)",
        apply=_mend_cpu_experts,
    ),
    Mend(
        name="rotate_every_head",
        link=_SOURCE + "model_executor/layers/rotary_embedding/base.py",
        versions="0.32",
        why="the kernel takes a head for the whole row when queries come as [token, head, dim], as latent "
        "attention's do, and rotates the first head only (silently wrong)",
        apply=_rotate_every_head,
    ),
    Mend(
        name="own_shared_memory",
        link=_SOURCE + "distributed/device_communicators/cpu_communicator.py",
        versions="0.32",
        why="names of shared memory segments are the same for each job of a machine and outlive a crash: the "
        "next start fails with errno 17",
        apply=_own_shared_memory,
    ),
    Mend(
        name="inspect_models_here",
        link=_SOURCE + "model_executor/models/registry.py",
        versions="0.32",
        why="the first start on a machine imports vLLM once more, in a child process, only to spare CUDA's "
        "initialisation: 10 s for nothing where there is no CUDA",
        apply=_inspect_models_here,
    ),
    Mend(
        name="leave_memory_unbound",
        link=_SOURCE + "v1/worker/cpu_worker.py",
        versions="0.32",
        why="the worker binds all further memory of the process, the trainer's included, to one NUMA node, "
        "and the process dies when that node is full",
        apply=_leave_memory_unbound,
    ),
)

_installed: list[str] = []


def install() -> None:
    """Apply every mend; idempotent, nothing on CUDA. RolloutError if vLLM is of another version."""
    check_version()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for mend in MENDS:
        if mend.name not in _installed:
            mend.apply()
            _installed.append(mend.name)


def share_job_token() -> None:
    """Agree on a fresh name for this engine's shared memory. Collective over WORLD."""
    token = torch.tensor(list(secrets.token_bytes(8)), dtype=torch.uint8)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    token = token.to(device)
    dist.broadcast(token, src=0)
    os.environ["MTRL_JOB_TOKEN"] = bytes(token.tolist()).hex()


def derived_weights(model: torch.nn.Module) -> list[Callable[[], None]]:
    """What must be computed again after each update, because the forward pass reads it besides the live
    parameters: latent attention's absorbed projections, and packed copies of experts in an order that
    ``kernel_layout`` does not know or with padding.
    """
    found: list[Callable[[], None]] = []
    for layer in model.modules():
        attention: Any = layer
        if hasattr(attention, "W_UK_T"):
            found.append(partial(attention.process_weights_after_loading, attention.W_UK_T.dtype))
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts: Any = getattr(kernel, "fused_experts", None)
        if hasattr(experts, "mtrl_packed") and not hasattr(attention.w13_weight, "kernel_layout"):
            found.append(partial(experts.process_weights_after_loading, layer))
    return found
