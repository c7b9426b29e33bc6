"""The numbers of a step and of an evaluation, and where they go: JSON lines, TensorBoard, wandb.

Key suffixes are units: ``_s`` seconds, ``_bytes``, ``_share`` a fraction of 1, ``_mean`` and ``_max`` over
the tokens or completions of the step. Plots are in ``plots.py``, the terminal in ``progress.py``.
"""

import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mtrl.config import Config
from mtrl.parallel.errors import MissingPackageError
from mtrl.run_folder import Json, RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Phase: TypeAlias = Literal["sft", "grpo"]
Activity: TypeAlias = Literal["generate_s", "reward_s", "logprobs_s", "train_s", "push_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Where the wall time of a step went on this rank; ``step_s`` is all of it."""

    generate_s: float = 0.0
    reward_s: float = 0.0
    logprobs_s: float = 0.0
    train_s: float = 0.0
    push_s: float = 0.0
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step of SFT or one step of GRPO. None: it does not apply, and the key is left out.

    ``step`` counts from 1 over the whole run, warm start included. ``num_tokens`` are the trained tokens
    (loss mask true) over all ranks. ``logprob_abs_diff_max`` and ``k3_kl`` (mean over trained tokens of
    r - 1 - log r with r = p_trainer / p_sampler, Schulman 2020, in nats) compare trainer and sampler on
    the same weights; ``logprob_mismatch_share`` is the share of tokens that differ by more than 1e-5.
    ``policy_version`` is the version of the weights that sampled. ``truncated_share`` is the share of
    completions that ended by length, ``clip_share`` that of tokens whose ratio was clipped.
    ``router_aux_loss`` (1: every expert gets the same) and ``router_z_loss`` are ``actor.router``'s A and Z.
    """

    step: int
    phase: Phase
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    seconds: StepSeconds
    router_aux_loss: float | None = None
    router_z_loss: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None
    completion_length_mean: float | None = None
    truncated_share: float | None = None
    clip_share: float | None = None
    ref_kl: float | None = None
    logprob_abs_diff_max: float | None = None
    logprob_mismatch_share: float | None = None
    k3_kl: float | None = None
    policy_version: int | None = None
    push_bytes_received: int | None = None

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens over the wall time of the whole step, generation included."""
        return self.num_tokens / self.seconds.step_s if self.seconds.step_s > 0 else 0.0

    def to_dict(self) -> dict[str, Json]:
        """The line of ``metrics.jsonl``: flat, without the keys that do not apply, with ``tokens_per_s``."""
        record = asdict(self)
        seconds = record.pop("seconds")
        flat = record | seconds | {"tokens_per_s": self.tokens_per_s}
        return {key: value for key, value in flat.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics:
    """Greedy accuracy on held-out prompts after ``step`` steps (0: before any)."""

    step: int
    phase: Phase
    accuracy: float
    num_prompts: int
    evaluation_s: float

    def to_dict(self) -> dict[str, Json]:
        """The line of ``evaluations.jsonl``."""
        return asdict(self)


class Stopwatch:
    """Wall time by activity, from construction on.

    ``synchronize`` is called at both ends of an activity; pass ``torch.cuda.synchronize`` on a GPU, whose
    kernels would otherwise be counted where something next waits for them::

        watch = Stopwatch()
        with watch("generate_s"):
            completions = engine.generate(...)
        metrics = StepMetrics(..., seconds=watch.read())
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._totals: dict[Activity, float] = {}
        self._start = self._now()

    @contextmanager
    def __call__(self, activity: Activity) -> Iterator[None]:
        """Add the time inside the block, also when it raises."""
        start = self._now()
        try:
            yield
        finally:
            self._totals[activity] = self._totals.get(activity, 0.0) + self._now() - start

    def read(self) -> StepSeconds:
        """The seconds so far; activities that did not happen are 0."""
        return StepSeconds(step_s=self._now() - self._start, **self._totals)

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Most memory this process has held at once: resident on the host, allocated on its GPU (0: none)."""

    host_bytes: int
    device_bytes: int


def peak_memory() -> PeakMemory:
    """Since the process began, or since torch's statistics were last reset for the GPU."""
    from mtrl.parallel.device import current_device

    device_bytes = 0
    if current_device().kind == "cuda":
        import torch

        device_bytes = torch.cuda.max_memory_allocated(current_device().torch_device)
    return PeakMemory(host_bytes=_peak_resident_bytes(), device_bytes=device_bytes)


def _peak_resident_bytes() -> int:
    # Linux's ru_maxrss survives exec: a process started by a large parent would report the parent's.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class MetricsWriter:
    """Writes steps and evaluations of rank 0 to every place the config names; does nothing on other ranks.

    Use as a context manager, or call `close`: TensorBoard writes its last events only then. ``first_step`` is
    the next step of a resumed run.
    """

    def __init__(self, folder: RunFolder, config: Config, *, first_step: int | None = None) -> None:
        self._folder = folder
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        if folder.is_writer and config.logging.tensorboard:
            self._tensorboard = _start_tensorboard(folder, first_step)
        if folder.is_writer and config.logging.wandb:
            self._wandb = _start_wandb(folder, config)

    def write_step(self, metrics: StepMetrics) -> None:
        """One line of ``metrics.jsonl``, and events under ``PHASE/KEY``."""
        self._folder.append_metrics(metrics.to_dict())
        self._log(metrics.phase, metrics.step, metrics.to_dict())

    def write_evaluation(self, metrics: EvaluationMetrics) -> None:
        """One line of ``evaluations.jsonl``, and events under ``evaluation/KEY``."""
        self._folder.append_evaluation(metrics.to_dict())
        self._log("evaluation", metrics.step, metrics.to_dict())

    def close(self) -> None:
        """Write what is still buffered; the writer is not used afterwards."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log(self, group: str, step: int, record: dict[str, Json]) -> None:
        numbers = {
            f"{group}/{key}": value
            for key, value in record.items()
            if isinstance(value, int | float) and key != "step"
        }
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers | {"step": step})


def _start_tensorboard(folder: RunFolder, first_step: int | None) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    # Events of steps that are made again are hidden.
    return SummaryWriter(str(folder.tensorboard_path), purge_step=first_step)


def _start_wandb(folder: RunFolder, config: Config) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise MissingPackageError(
            f"logging.wandb is true and wandb does not import ({error}); `pip install wandb`, or write "
            "logging.wandb=false"
        ) from error
    project, name = config.logging.wandb_project, folder.path.name
    return wandb.init(project=project, name=name, dir=str(folder.path), config=asdict(config))
