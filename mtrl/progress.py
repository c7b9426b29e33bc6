"""What rank 0 shows while it works: a bar on a terminal, plain lines in a log, and a table at the end."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from mtrl.metrics import StepMetrics

LINE_EVERY_S = 5.0
ProgressMode = Literal["auto", "bar", "lines", "none"]


class Progress(Protocol):
    """A view of a run that goes through phases (warm start, GRPO) of known length."""

    def start_phase(self, name: str, num_steps: int) -> None:
        """A phase begins; the one before it is over."""
        ...

    def update(self, metrics: StepMetrics) -> None:
        """One more step of the phase is done."""
        ...

    def message(self, text: str) -> None:
        """One line for the reader, above the bar."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found. Calling it again does nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """A line of the closing table; texts as they are to be shown."""

    name: str
    before: str
    after: str


def open_progress(mode: ProgressMode, *, rank: int, stream: TextIO | None = None) -> Progress:
    """The view for this rank: nothing on ranks above 0. ``auto`` is a bar where ``stream`` is a terminal."""
    stream = stream or sys.stdout
    if rank != 0 or mode == "none":
        return SilentProgress()
    if mode == "bar" or (mode == "auto" and stream.isatty()):
        return BarProgress(Console(file=stream))
    return LineProgress(stream)


def comparison_table(title: str, rows: Sequence[ComparisonRow], *, before: str, after: str) -> Table:
    """The closing table; ``before`` and ``after`` head its columns. Print it with `rich.console.Console`."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column(before, justify="right")
    table.add_column(after, justify="right", style="bold")
    for row in rows:
        table.add_row(row.name, row.before, row.after)
    return table


def print_comparison(
    title: str, rows: Sequence[ComparisonRow], *, before: str = "before", after: str = "after"
) -> None:
    """Print `comparison_table` to standard output, in colour on a terminal."""
    Console().print(comparison_table(title, rows, before=before, after=after))


def describe_step(metrics: StepMetrics) -> str:
    """``reward 0.41  loss 0.0132  1,530 tokens/s``, without what does not apply."""
    parts = [] if metrics.reward_mean is None else [f"reward {metrics.reward_mean:.3f}"]
    parts += [f"loss {metrics.loss:.4f}", f"{metrics.tokens_per_s:,.0f} tokens/s"]
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """``42s``, ``3m05s``, ``2h07m``: rounded to what a reader waits by."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def time_left_s(elapsed_s: float, num_done: int, num_steps: int) -> float:
    """What the rest of a phase takes if its steps go on as they went so far."""
    return elapsed_s / num_done * (num_steps - num_done)


class SilentProgress:
    """Shows nothing."""

    def start_phase(self, name: str, num_steps: int) -> None:
        """See `Progress`."""

    def update(self, metrics: StepMetrics) -> None:
        """See `Progress`."""

    def message(self, text: str) -> None:
        """See `Progress`."""

    def close(self) -> None:
        """See `Progress`."""


class LineProgress:
    """Whole lines, for logs: the first and last step of a phase, and one when five seconds have passed."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._name, self._num_steps, self._num_done = "", 0, 0
        self._phase_start = self._last_line = clock()

    def start_phase(self, name: str, num_steps: int) -> None:
        """See `Progress`."""
        self._name, self._num_steps, self._num_done = name, num_steps, 0
        self._phase_start = self._clock()

    def update(self, metrics: StepMetrics) -> None:
        """See `Progress`."""
        self._num_done += 1
        now, is_edge = self._clock(), self._num_done in (1, self._num_steps)
        if not is_edge and now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        left_s = time_left_s(now - self._phase_start, self._num_done, self._num_steps)
        count = f"{self._num_done:>{len(str(self._num_steps))}}/{self._num_steps}"
        self.message(f"{self._name} {count}  {describe_step(metrics)}  {format_duration(left_s)} left")

    def message(self, text: str) -> None:
        """See `Progress`."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """See `Progress`."""


class BarProgress:
    """A bar for each phase, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            _TimeLeftColumn(),
            console=console,
        )
        self._bars.start()
        self._task: TaskID | None = None

    def start_phase(self, name: str, num_steps: int) -> None:
        """See `Progress`."""
        self._task = self._bars.add_task(name, total=num_steps, numbers="")

    def update(self, metrics: StepMetrics) -> None:
        """See `Progress`."""
        assert self._task is not None, "start_phase comes before update"
        self._bars.update(self._task, advance=1, numbers=describe_step(metrics))

    def message(self, text: str) -> None:
        """See `Progress`."""
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """See `Progress`."""
        self._bars.stop()


class _TimeLeftColumn(ProgressColumn):
    # rich's own column averages over its last 30 s, which jumps when a step takes minutes.
    def render(self, task: Task) -> Text:
        """What is left of the phase, or how long it took."""
        if task.finished:
            return Text(f"in {format_duration(task.finished_time or 0.0)}")
        if not task.completed or task.total is None or task.elapsed is None:
            return Text("")
        left_s = time_left_s(task.elapsed, int(task.completed), int(task.total))
        return Text(f"{format_duration(left_s)} left", style="cyan")
