"""Defects of Megatron-Core mended on any machine, each with its link, the versions that have it and why.

A mend whose ``versions`` do not contain the installed one is not applied. Tests prove both sides: without the
mend the listed versions are wrong, and the others are right. What only a machine without CUDA needs is in
host.py.

Known and not mended here, for the trainer to refuse or configure around: with a virtual pipeline on two
stages, batched sends and receives between the same two ranks cross over gloo (wrong activations, no error),
and ``deallocate_pipeline_outputs`` frees storage that a gloo send may still read. On CPU a virtual pipeline
needs ``overlap_p2p_comm=True, batch_p2p_comm=False, deallocate_pipeline_outputs=False``.
"""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from packaging.specifiers import SpecifierSet

from mtrl.parallel import host


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """``owner.attribute`` becomes ``value``."""

    owner: Any
    attribute: str
    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """One upstream defect: where it is reported, which Megatron-Core versions have it, what is wrong.

    ``replacements`` imports what it mends and says what to put there; it changes nothing itself.
    """

    name: str
    link: str
    versions: str
    why: str
    replacements: Callable[[], Sequence[Replacement]]

    @property
    def is_needed(self) -> bool:
        """Whether the installed Megatron-Core is one of ``versions``."""
        installed = importlib.metadata.version("megatron-core")
        return SpecifierSet(self.versions).contains(installed, prereleases=True)


_ABSENT = object()
_originals: dict[str, list[Replacement]] = {}


def uses_expert_groups(config: Any) -> bool:
    """Whether expert weights live on other groups than attention's: ep > 1 or etp != tp.

    ``config`` is a Megatron ``TransformerConfig``.
    """
    return bool(
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )


def _after_experts_are_built(mark: Callable[[Any, Any], None]) -> list[Replacement]:
    """Have ``mark(experts, config)`` called at the end of every ``MoELayer.__init__``."""
    moe_layer = importlib.import_module("megatron.core.transformer.moe.moe_layer").MoELayer
    original = moe_layer.__init__

    @wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        mark(self.experts, self.config)

    return [Replacement(owner=moe_layer, attribute="__init__", value=initialise)]


def _expert_gradients() -> list[Replacement]:
    def mark(experts: Any, config: Any) -> None:
        # ``allreduce`` is Megatron's mark for "reduced with attention's groups".
        for parameter in experts.parameters():
            parameter.allreduce = not uses_expert_groups(config)

    return _after_experts_are_built(mark)


def _expert_shards() -> list[Replacement]:
    def mark(experts: Any, config: Any) -> None:
        # Experts of other packages mark their own.
        if config.expert_tensor_parallel_size > 1 and type(experts).__module__.startswith("megatron."):
            for name, parameter in experts.named_parameters():
                # The bias added after the sum over etp is the one parameter that every etp rank holds whole.
                is_whole = "linear_fc2" in name and "bias" in name
                parameter.tensor_model_parallel = not is_whole

    return _after_experts_are_built(mark)


def _expert_gradient_norm() -> list[Replacement]:
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    is_first_copy = layers.param_is_not_tensor_parallel_duplicate
    copy_attributes = layers.copy_tensor_model_parallel_attributes

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

    modules = [
        importlib.import_module(f"megatron.core.{name}")
        for name in ("tensor_parallel.layers", "tensor_parallel", "optimizer.clip_grads")
    ]
    mended = {
        "param_is_not_tensor_parallel_duplicate": is_first_copy_mended,
        "copy_tensor_model_parallel_attributes": copy_attributes_mended,
    }
    return [
        Replacement(owner=module, attribute=name, value=value)
        for module in modules
        for name, value in mended.items()
        if hasattr(module, name)
    ]


def _sharded_weights() -> list[Replacement]:
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")

    def marking(original: Callable[..., None], dim: int) -> Callable[..., None]:
        @wraps(original)
        def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            weight = getattr(self, "weight", None)
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                layers.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)

        return initialise

    return [
        Replacement(owner=owner, attribute="__init__", value=marking(owner.__init__, dim))
        for owner, dim in (
            (layers.VocabParallelEmbedding, 0),
            (layers.ColumnParallelLinear, 0),
            (layers.RowParallelLinear, 1),
        )
    ]


def _te_general_gemm() -> list[Replacement]:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if hasattr(moe_utils, "te_general_gemm"):
        return []
    return [Replacement(owner=moe_utils, attribute="te_general_gemm", value=None)]


def _mla_without_transformer_engine() -> list[Replacement]:
    attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    if _has_transformer_engine():
        return []
    return [Replacement(owner=attention, attribute="HAVE_TE", value=False)]


class _NoFP8State:
    """Stands for Transformer Engine's ``FP8GlobalStateManager`` where there is none."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _recompute_without_transformer_engine() -> list[Replacement]:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    names = {
        "FP8GlobalStateManager": _NoFP8State,
        "activation_recompute_forward": _null_context,
        "fp8_autocast": _null_context,
    }
    return [
        Replacement(owner=random, attribute=name, value=value)
        for name, value in names.items()
        if not hasattr(random, name)
    ]


def _null_context(*args: object, **kwargs: object) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _has_transformer_engine() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


_PULL = "https://github.com/NVIDIA/Megatron-LM/pull/5916"
_UNREPORTED = "no report known"

MENDS: tuple[Mend, ...] = (
    Mend(
        name="expert_gradients",
        link=_PULL,
        versions="<0.19",
        why="with ep 1 and etp != tp, expert gradients are silently reduced over attention's groups",
        replacements=_expert_gradients,
    ),
    Mend(
        name="expert_gradient_norm",
        link=_PULL,
        versions="<0.19",
        why="experts that etp does not shard (grouped GEMM, etp 1) are counted on attention's first tp rank "
        "only, so the gradient norm leaves the others out and clipping is too weak",
        replacements=_expert_gradient_norm,
    ),
    Mend(
        name="expert_shards",
        link=_PULL,
        versions="<0.19",
        why="Transformer Engine's experts do not say that etp shards them, so the gradient norm counts the "
        "first etp rank's only",
        replacements=_expert_shards,
    ),
    Mend(
        name="sharded_weights",
        link=_UNREPORTED,
        versions="<0.19",
        why="with perform_initialization=False sharded weights are not marked as such, so the gradient norm "
        "counts the first tp rank's only (tensor_parallel/layers.py)",
        replacements=_sharded_weights,
    ),
    Mend(
        name="te_general_gemm",
        link=_UNREPORTED,
        versions="<0.19",
        why="the router's fp32 GEMM reads a name that exists only with Transformer Engine",
        replacements=_te_general_gemm,
    ),
    Mend(
        name="mla_without_transformer_engine",
        link=_UNREPORTED,
        versions="<0.19",
        why="without Transformer Engine its names are mocks yet HAVE_TE is True: isinstance() raises",
        replacements=_mla_without_transformer_engine,
    ),
    Mend(
        name="recompute_without_transformer_engine",
        link=_UNREPORTED,
        versions="<0.20",
        why="recomputing a norm's output reads FP8GlobalStateManager, undefined without Transformer Engine",
        replacements=_recompute_without_transformer_engine,
    ),
)


def install() -> None:
    """Apply every mend that the installed Megatron-Core needs. Idempotent."""
    host.install()
    _apply(mend for mend in MENDS if mend.is_needed and mend.name not in _originals)


def undo(name: str) -> None:
    """Take one applied mend back, if it was applied. For the tests that prove it is needed."""
    applied = list(_originals)
    # Mends of one function wrap each other, so all come off and the others go on again.
    for each in reversed(applied):
        for original in reversed(_originals.pop(each)):
            _put(original)
    _apply(mend for mend in MENDS if mend.name in applied and mend.name != name)


def _apply(mends: Iterable[Mend]) -> None:
    for mend in mends:
        _originals[mend.name] = [_put(each) for each in mend.replacements()]


def _put(new: Replacement) -> Replacement:
    """Make the replacement and return the one that reverses it."""
    old = getattr(new.owner, new.attribute, _ABSENT)
    if new.value is _ABSENT:
        delattr(new.owner, new.attribute)
    else:
        setattr(new.owner, new.attribute, new.value)
    return Replacement(owner=new.owner, attribute=new.attribute, value=old)
