"""Defects of Megatron-Core mended on any machine, each with its link, the versions that have it and why.

A mend whose ``versions`` do not contain the installed one is not applied. Tests prove both sides: without the
mend the listed versions are wrong, and the others are right. What only a machine without CUDA needs is host.py's.

Known and not mended here, to be refused or configured around by the trainer: with a virtual pipeline on two
stages, batched sends and receives between the same two ranks cross over gloo (wrong activations, no error), and
``deallocate_pipeline_outputs`` frees storage that a gloo send may still read. On CPU a virtual pipeline needs
``overlap_p2p_comm=True, batch_p2p_comm=False, deallocate_pipeline_outputs=False``.
"""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from packaging.specifiers import SpecifierSet

from mtrl.parallel import host

_applied: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """One upstream defect: where it is reported, which Megatron-Core versions have it, what is wrong."""

    name: str
    link: str
    versions: str
    why: str
    apply: Callable[[], None]

    @property
    def is_needed(self) -> bool:
        """Whether the installed Megatron-Core is one of ``versions``."""
        return SpecifierSet(self.versions).contains(
            importlib.metadata.version("megatron-core"), prereleases=True
        )


def uses_expert_groups(config: Any) -> bool:
    """Whether expert weights live on other groups than attention's: ep > 1 or etp != tp.

    ``config`` is a Megatron ``TransformerConfig``.
    """
    return bool(
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )


def _reduce_expert_gradients_over_expert_groups() -> None:
    moe_layer = importlib.import_module("megatron.core.transformer.moe.moe_layer")
    original = moe_layer.MoELayer.__init__

    @wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # ``allreduce`` is Megatron's mark for "reduced with attention's groups".
        for parameter in self.experts.parameters():
            parameter.allreduce = not uses_expert_groups(self.config)

    moe_layer.MoELayer.__init__ = initialise


def _count_each_expert_once_in_the_gradient_norm() -> None:
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    is_first_copy, copy_attributes = (
        layers.param_is_not_tensor_parallel_duplicate,
        layers.copy_tensor_model_parallel_attributes,
    )

    @wraps(is_first_copy)
    def is_first_copy_mended(param: Any, tp_group: Any = None) -> bool:
        if not getattr(param, "allreduce", True):
            tp_group = parallel_state.get_expert_tensor_parallel_group()
        return bool(is_first_copy(param, tp_group))

    @wraps(copy_attributes)
    def copy_attributes_mended(destination_tensor: Any, source_tensor: Any) -> None:
        copy_attributes(destination_tensor, source_tensor)
        # The fp32 copies that the norm is taken over must still say that they belong to an expert.
        if hasattr(source_tensor, "allreduce"):
            destination_tensor.allreduce = source_tensor.allreduce

    for module in _modules("tensor_parallel.layers", "tensor_parallel", "optimizer.clip_grads"):
        _replace(module, is_first_copy, is_first_copy_mended)
        _replace(module, copy_attributes, copy_attributes_mended)


def _define_te_general_gemm() -> None:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _see_that_transformer_engine_is_absent() -> None:
    attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    attention.HAVE_TE = attention.HAVE_TE and _has_transformer_engine()


class _NoFP8State:
    """Stands for Transformer Engine's ``FP8GlobalStateManager`` where there is none."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _define_fp8_names_of_recompute() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    for name, value in {
        "FP8GlobalStateManager": _NoFP8State,
        "activation_recompute_forward": contextlib.nullcontext,
        "fp8_autocast": contextlib.nullcontext,
    }.items():
        if not hasattr(random, name):
            setattr(random, name, value)


def _modules(*names: str) -> list[Any]:
    return [importlib.import_module(f"megatron.core.{name}") for name in names]


def _replace(module: Any, old: object, new: object) -> None:
    for name, value in list(vars(module).items()):
        if value is old:
            setattr(module, name, new)


def _has_transformer_engine() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


_PULL = "https://github.com/NVIDIA/Megatron-LM/pull/5916"
_MEASURED = "not reported upstream; see why"

MENDS: tuple[Mend, ...] = (
    Mend(
        name="expert_gradients",
        link=_PULL,
        versions="<0.19",
        why="with ep 1 and etp != tp, expert gradients are reduced over attention's groups: wrong sums, no warning",
        apply=_reduce_expert_gradients_over_expert_groups,
    ),
    Mend(
        name="expert_gradient_norm",
        link=_PULL,
        versions="<0.19",
        why="experts not marked tensor-parallel (grouped GEMM, etp 1) are counted on attention's tp rank 0 only, "
        "so the gradient norm leaves the others out and clipping is too weak",
        apply=_count_each_expert_once_in_the_gradient_norm,
    ),
    Mend(
        name="te_general_gemm",
        link=_MEASURED,
        versions="<0.19",
        why="the router's fp32 GEMM reads a name that exists only with Transformer Engine: NameError without it",
        apply=_define_te_general_gemm,
    ),
    Mend(
        name="mla_without_transformer_engine",
        link=_MEASURED,
        versions="<0.19",
        why="without Transformer Engine its names are mocks and HAVE_TE is True: isinstance() raises TypeError",
        apply=_see_that_transformer_engine_is_absent,
    ),
    Mend(
        name="recompute_without_transformer_engine",
        link=_MEASURED,
        versions="<0.20",
        why="recomputing a norm's output reads FP8GlobalStateManager, undefined without Transformer Engine",
        apply=_define_fp8_names_of_recompute,
    ),
)


def install() -> None:
    """Apply every mend that the installed Megatron-Core needs. Idempotent."""
    host.install()
    for mend in MENDS:
        if mend.is_needed and mend.name not in _applied:
            mend.apply()
            _applied.add(mend.name)
