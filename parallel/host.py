"""What Megatron-Core needs answered where there is no CUDA, so that the same code trains on CPU over gloo.

`install` does nothing where there is a GPU. Elsewhere it makes Python load ``megatron.*`` with three changes,
none of which any other package sees:

1. string constants in Megatron's code read as in `CONSTANTS`: "cuda" as "cpu";
2. Megatron's modules see ``torch`` through a view in which the names of `ANSWERS` are answered;
3. the Megatron functions of `ANSWERS` whose bodies assume a GPU are replaced.

``torch`` itself keeps saying that there is no CUDA: ``torch.cuda.is_available()`` stays False, and outside
Megatron ``torch.zeros(1, device="cuda")`` and ``tensor.cuda()`` still raise. That is what lets vLLM's CPU
build run in the same process. Every answer carries its reason; tests check that each is still asked for.

Left out: defects of Megatron that show on any machine (megatron_mends.py); norm and attention layers that
exist only in Transformer Engine (models/backends).
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from packaging.specifiers import SpecifierSet

from mtrl.parallel.device import current_device

_PREFIX = "megatron"
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One thing Megatron asks that a machine without CUDA cannot answer.

    ``where`` is a torch module (as Megatron sees it), a torch class (for callers in Megatron) or a Megatron
    module; ``attribute`` is the name in it; ``versions`` are the Megatron-Core versions that ask.
    """

    where: str
    attribute: str
    value: object
    why: str
    versions: str = ">=0.16"

    @property
    def name(self) -> str:
        """Where and what, dotted."""
        return f"{self.where}.{self.attribute}"


CONSTANTS: dict[str, str] = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
"""Strings in Megatron's code, devices or what ``tensor.type()`` is compared with, and what they read as."""


class HostEvent:
    """A CUDA event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def _at_once(self, *args: object) -> None: ...

    record = wait = synchronize = _at_once


class HostStream:
    """A CUDA stream on which everything is done when it is asked for: waiting does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def _at_once(self, *args: object) -> None: ...

    wait_stream = wait_event = synchronize = _at_once

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """``event``, or a new one."""
        return event or HostEvent()


_STREAM = HostStream()


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _get_rng_state(device: object = None, **kwargs: object) -> torch.Tensor:
    """The host generator's state; Megatron's "CUDA" draws come from the host generator here."""
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _unpinned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, **kwargs)

    return create


def _all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """``dist.all_gather`` that lets first dimensions differ over ``group``: pad to the longest, then cut."""
    lengths = [each.shape[0] if each.dim() else 1 for each in tensor_list]
    if len(set(lengths)) == 1:
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    if async_op:
        raise NotImplementedError("all_gather of uneven shapes over gloo is synchronous only")
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    for target, source, length in zip(tensor_list, received, lengths, strict=True):
        target.copy_(source[:length])
    return None


def _reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> None:
    """``dist.reduce_scatter`` of an even or uneven list: reduce all over ``group``, keep this rank's part."""
    if async_op:
        raise NotImplementedError("reduce_scatter of a list over gloo is synchronous only")
    reduced = torch.cat([each.reshape(-1) for each in input_list])
    dist.all_reduce(reduced, op=op, group=group)
    sizes = [each.numel() for each in input_list]
    output.copy_(torch.split(reduced, sizes)[dist.get_rank(group)].view_as(output))


def _all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """``dist.all_reduce`` with the average that gloo lacks."""
    if op != dist.ReduceOp.AVG:
        return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)
    if async_op:
        raise NotImplementedError("all_reduce with AVG over gloo is synchronous only")
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor.div_(dist.get_world_size(group)) and None


def _barrier(group: Any = None, async_op: bool = False, device_ids: object = None) -> Any:
    return dist.barrier(group=group, async_op=async_op)


def _itself(given: Any, *args: object, **kwargs: object) -> Any:
    return given


def _maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _null_context(*args: object, **kwargs: object) -> nullcontext[None]:
    return nullcontext()


_RANDOM = "megatron.core.tensor_parallel.random"


def _answer(where: str, why: str, **values: object) -> tuple[Answer, ...]:
    return tuple(Answer(where=where, attribute=name, value=value, why=why) for name, value in values.items())


ANSWERS: tuple[Answer, ...] = (
    *_answer("torch.cuda", "the device of most new tensors; asks the driver", current_device=lambda: _CPU),
    *_answer("torch.cuda", "raises without a driver", set_device=_nothing, synchronize=_nothing),
    *_answer("torch.cuda", "cannot be made without a driver", Stream=HostStream, Event=HostEvent),
    *_answer(
        "torch.cuda",
        "asks the driver; host work is already in order",
        stream=_null_context,
        current_stream=lambda *args: _STREAM,
        default_stream=lambda *args: _STREAM,
    ),
    *_answer(
        "torch.cuda",
        "the RNG tracker and recompute save, seed and restore it",
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        manual_seed=torch.manual_seed,
    ),
    *_answer("torch.cuda.random", "the RNG tracker saves it", get_rng_state=_get_rng_state),
    *_answer(
        "torch.cuda.nvtx",
        "the CPU build has no NVTX",
        range=_null_context,
        range_push=_nothing,
        range_pop=_nothing,
    ),
    *_answer("torch", "pin_memory needs CUDA", tensor=_unpinned(torch.tensor), empty=_unpinned(torch.empty)),
    *_answer(
        "torch.distributed",
        "gloo refuses uneven shapes, which dispatch over expert tensor parallelism gathers",
        all_gather=_all_gather,
    ),
    *_answer(
        "torch.distributed",
        "gloo has none for lists, the backward of the uneven gather",
        reduce_scatter=_reduce_scatter,
    ),
    *_answer(
        "torch.distributed",
        "gloo has no ReduceOp.AVG, which auxiliary losses' logs use",
        all_reduce=_all_reduce,
    ),
    *_answer("torch.distributed", "gloo refuses device_ids", barrier=_barrier),
    *_answer("torch.Tensor", "raises without a driver", cuda=_itself, pin_memory=_itself),
    *_answer("torch.Tensor", "has no CPU implementation", record_stream=_nothing),
    *_answer("torch.nn.Module", "raises without a driver", cuda=_itself),
    *_answer(
        _RANDOM,
        "indexes torch.cuda.default_generators, or waits until CUDA is initialised, which never comes",
        _get_cuda_rng_state=_get_rng_state,
        _set_cuda_rng_state=_set_rng_state,
    ),
    *_answer(
        "megatron.core.transformer.moe.moe_utils",
        "leaves a CPU tensor as it is even if numpy was asked for; all_to_all_single refuses it as splits",
        maybe_move_tensor_to_cpu=_maybe_move_tensor_to_cpu,
    ),
    *_answer(
        "megatron.core.jit",
        "torch.compile of small functions costs a C++ compiler and seconds a process, for nothing on CPU",
        jit_fuser=_itself,
    ),
)


def answers() -> tuple[Answer, ...]:
    """The answers that the installed Megatron-Core asks for."""
    version = importlib.metadata.version("megatron-core")
    return tuple(each for each in ANSWERS if SpecifierSet(each.versions).contains(version, prereleases=True))


def install() -> None:
    """Make Megatron-Core importable and runnable here. Idempotent; does nothing where there is CUDA.

    Raises:
        ImportError: Megatron was imported before, with its questions unanswered.
    """
    if current_device().kind == "cuda" or any(isinstance(each, _Finder) for each in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise ImportError("mtrl.parallel.host.install() must run before the first import of megatron.core")
    here = answers()
    _answer_methods(here)
    # The tracker forks the host generator itself here, which its own check would report at every layer.
    logging.getLogger(_RANDOM).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    sys.meta_path.insert(0, _Finder(here))


def _answer_methods(here: Sequence[Answer]) -> None:
    classes: dict[str, type] = {"torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}
    for each in here:
        if each.where in classes:
            owner = classes[each.where]
            setattr(owner, each.attribute, _for_megatron(getattr(owner, each.attribute), each.value))


def _for_megatron(original: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    """``answer`` if the caller is Megatron's code, else ``original``, which raises as it did before."""

    def call(*args: Any, **kwargs: Any) -> Any:
        caller: FrameType = sys._getframe(1)
        asked_by_megatron = str(caller.f_globals.get("__name__", "")).partition(".")[0] == _PREFIX
        return (answer if asked_by_megatron else original)(*args, **kwargs)

    call.__name__ = call.__qualname__ = getattr(original, "__name__", "call")
    call.__doc__ = original.__doc__
    return call


class _View(ModuleType):
    """A module as Megatron sees it: ``names`` answered, all else looked up in the real module each time."""

    def __init__(self, module: ModuleType, names: dict[str, object]) -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(names)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_module"], name, value)


def _torch_views(here: Sequence[Answer]) -> dict[str, _View]:
    """Views of torch and of its answered submodules, each reachable from its parent's view."""

    def names(where: str) -> dict[str, object]:
        return {each.attribute: each.value for each in here if each.where == where}

    nvtx = _View(torch.cuda.nvtx, names("torch.cuda.nvtx"))
    rng = _View(torch.cuda.random, names("torch.cuda.random"))
    cuda = _View(torch.cuda, names("torch.cuda") | {"nvtx": nvtx, "random": rng})
    distributed = _View(dist, names("torch.distributed"))
    root = _View(torch, names("torch") | {"cuda": cuda, "distributed": distributed})
    return {"torch": root, "torch.cuda": cuda, "torch.distributed": distributed, "torch.cuda.nvtx": nvtx}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.*`` as usual, to be loaded by `_Loader`."""

    def __init__(self, here: Sequence[Answer]) -> None:
        self.answers = tuple(here)
        self.views = _torch_views(here)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != _PREFIX:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one Megatron module: constants replaced before it runs, names after."""

    def __init__(self, fullname: str, path: str, finder: _Finder) -> None:
        super().__init__(fullname, path)
        self.finder = finder

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return None if code is None else _with_constants(code)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        real = {id(sys.modules[name]): view for name, view in self.finder.views.items()}
        for name, value in list(vars(module).items()):
            if isinstance(value, ModuleType) and id(value) in real:
                setattr(module, name, real[id(value)])
        for each in self.finder.answers:
            if each.where == module.__name__ and hasattr(module, each.attribute):
                setattr(module, each.attribute, each.value)


def _with_constants(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple(_constant(each) for each in code.co_consts))


def _constant(value: object) -> object:
    if isinstance(value, str):
        return CONSTANTS.get(value, value)
    if isinstance(value, CodeType):
        return _with_constants(value)
    if isinstance(value, tuple | frozenset):
        return type(value)(_constant(each) for each in value)
    return value
