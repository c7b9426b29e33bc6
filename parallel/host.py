"""What Megatron-Core needs answered where there is no CUDA, so that the same code trains on CPU over gloo.

`install` does nothing where there is a GPU. Elsewhere it makes Python load ``megatron.*`` with three changes,
none of which any other package sees:

1. the string constants "cuda" and "torch.cuda.FloatTensor" in Megatron's code read "cpu" and "torch.FloatTensor";
2. Megatron's modules see ``torch`` through a view in which the names of `ANSWERS` are answered;
3. the Megatron functions of `ANSWERS` whose bodies assume a GPU are replaced.

``torch`` itself keeps saying that there is no CUDA: ``torch.cuda.is_available()`` stays False, and outside
Megatron ``torch.zeros(1, device="cuda")`` and ``tensor.cuda()`` still raise. That is what lets vLLM's CPU build
run in the same process. Every answer carries its reason; tests check that each is still asked for.

Left out: defects of Megatron that show on any machine (megatron_mends.py); norm and attention layers that exist
only in Transformer Engine (models/backends).
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

    ``where`` is a torch module (seen by Megatron only), a torch class (answered for callers in Megatron only) or a
    Megatron module; ``attribute`` is the name in it; ``versions`` are the Megatron-Core versions that ask.
    """

    where: str
    attribute: str
    value: object
    why: str
    versions: str = ">=0.16"

    @property
    def name(self) -> str:
        return f"{self.where}.{self.attribute}"


CONSTANTS: dict[str, str] = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
"""String constants of Megatron's code and what they read as: devices of new tensors, and ``tensor.type()`` compared."""


class HostStream:
    """A CUDA stream where all work is already in order: waiting and recording do nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = _CPU

    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: "HostEvent | None" = None) -> "HostEvent":
        return event or HostEvent()


class HostEvent:
    """A CUDA event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


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
    """``dist.all_gather`` that allows first dimensions to differ over ``group``; pads to the longest, then cuts."""
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
    """``dist.reduce_scatter`` of a list, even or not: reduce everything, keep this rank's part of ``group``."""
    if async_op:
        raise NotImplementedError("reduce_scatter of a list over gloo is synchronous only")
    reduced = torch.cat([each.reshape(-1) for each in input_list])
    dist.all_reduce(reduced, op=op, group=group)
    sizes = [each.numel() for each in input_list]
    output.copy_(reduced.split(sizes)[dist.get_rank(group)].view_as(output))


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


def _same_tensor(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return tensor


def _same_module(module: torch.nn.Module, *args: object, **kwargs: object) -> torch.nn.Module:
    return module


def _maybe_move_tensor_to_cpu(
    tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@contextmanager
def _nvtx_range(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def _on_stream(stream: object) -> nullcontext[None]:
    return nullcontext()


_RANDOM = "megatron.core.tensor_parallel.random"
_MOE_UTILS = "megatron.core.transformer.moe.moe_utils"

ANSWERS: tuple[Answer, ...] = (
    Answer(
        where="torch.cuda",
        attribute="current_device",
        value=lambda: _CPU,
        why="used as the device of new tensors all over Megatron; raises without a driver",
    ),
    Answer(where="torch.cuda", attribute="set_device", value=_nothing, why="raises without a driver"),
    Answer(where="torch.cuda", attribute="synchronize", value=_nothing, why="host work is already in order"),
    Answer(where="torch.cuda", attribute="Stream", value=HostStream, why="cannot be made without a driver"),
    Answer(where="torch.cuda", attribute="Event", value=HostEvent, why="cannot be made without a driver"),
    Answer(where="torch.cuda", attribute="stream", value=_on_stream, why="enters a HostStream"),
    Answer(where="torch.cuda", attribute="current_stream", value=lambda *a: _STREAM, why="asks the driver"),
    Answer(where="torch.cuda", attribute="default_stream", value=lambda *a: _STREAM, why="asks the driver"),
    Answer(where="torch.cuda", attribute="get_rng_state", value=_get_rng_state, why="RNG tracker"),
    Answer(where="torch.cuda", attribute="set_rng_state", value=_set_rng_state, why="RNG tracker"),
    Answer(where="torch.cuda", attribute="manual_seed", value=torch.manual_seed, why="RNG tracker seeds with it"),
    Answer(where="torch.cuda.random", attribute="get_rng_state", value=_get_rng_state, why="recompute"),
    Answer(where="torch.cuda.nvtx", attribute="range_push", value=_nothing, why="NVTX is not in the CPU build"),
    Answer(where="torch.cuda.nvtx", attribute="range_pop", value=_nothing, why="NVTX is not in the CPU build"),
    Answer(where="torch.cuda.nvtx", attribute="range", value=_nvtx_range, why="NVTX is not in the CPU build"),
    Answer(where="torch", attribute="tensor", value=_unpinned(torch.tensor), why="pin_memory needs CUDA"),
    Answer(where="torch", attribute="empty", value=_unpinned(torch.empty), why="pin_memory needs CUDA"),
    Answer(
        where="torch.distributed",
        attribute="all_gather",
        value=_all_gather,
        why="gloo refuses uneven shapes, which dispatch over expert tensor parallelism gathers",
    ),
    Answer(
        where="torch.distributed",
        attribute="reduce_scatter",
        value=_reduce_scatter,
        why="gloo has no reduce_scatter of a list, the backward of the uneven gather",
    ),
    Answer(
        where="torch.distributed",
        attribute="all_reduce",
        value=_all_reduce,
        why="gloo has no ReduceOp.AVG, which the auxiliary losses' log uses",
    ),
    Answer(where="torch.distributed", attribute="barrier", value=_barrier, why="gloo refuses device_ids"),
    Answer(where="torch.Tensor", attribute="cuda", value=_same_tensor, why="raises without a driver"),
    Answer(where="torch.Tensor", attribute="pin_memory", value=_same_tensor, why="raises without a driver"),
    Answer(where="torch.Tensor", attribute="record_stream", value=_nothing, why="has no CPU implementation"),
    Answer(where="torch.nn.Module", attribute="cuda", value=_same_module, why="raises without a driver"),
    Answer(
        where=_RANDOM,
        attribute="_get_cuda_rng_state",
        value=_get_rng_state,
        why="initialises CUDA, or indexes torch.cuda.default_generators",
    ),
    Answer(
        where=_RANDOM,
        attribute="_set_cuda_rng_state",
        value=_set_rng_state,
        why="defers to the moment CUDA is initialised, which never comes",
    ),
    Answer(
        where=_MOE_UTILS,
        attribute="maybe_move_tensor_to_cpu",
        value=_maybe_move_tensor_to_cpu,
        why="returns a CPU tensor as it is even if numpy was asked for; all_to_all_single then gets tensors as splits",
    ),
    Answer(
        where="megatron.core.jit",
        attribute="jit_fuser",
        value=_undecorated,
        why="torch.compile of small functions costs a C++ compiler and seconds a process, for nothing on CPU",
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
    # The RNG tracker forks the host generator itself here, which is what its check then reports at every layer.
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
