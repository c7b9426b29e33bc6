"""``reward.png``: what a run learned, drawn from ``metrics.jsonl`` and ``evaluations.jsonl``."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtrl.run_folder import Json, read_lines

_REWARD, _ACCURACY, _LOSS, _INK, _FAINT = "#2a6f97", "#d1495b", "#8d99ae", "#22223b", "#f1f3f6"
_SMOOTHING_STEPS = 8  # of the exponential mean's memory

Points = tuple[list[float], list[float]]


def plot_rewards(metrics_path: Path, evaluations_path: Path, plot_path: Path, *, title: str) -> None:
    """Draw sampled reward and held-out accuracy over steps, with the SFT phase shaded and its loss beside it.

    Writes a PNG of 1350 x 750 pixels. Curves that have no points are left out.
    """
    steps, evaluations = read_lines(metrics_path), read_lines(evaluations_path)
    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _prepare(axes, title)
    last_sft = max((_number(line, "step") for line in steps if line.get("phase") == "sft"), default=0.0)
    if last_sft:
        _draw_sft(axes, points(steps, "loss", phase="sft"), last_sft)
    _draw_reward(axes, points(steps, "reward_mean"))
    _draw_accuracy(axes, points(evaluations, "accuracy"), named={last_sft})
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    figure.savefig(plot_path)


def points(lines: Sequence[dict[str, Json]], key: str, phase: str | None = None) -> Points:
    """Steps and values of the lines that hold a number under ``key`` (and are of ``phase``, if given)."""
    chosen = [
        line
        for line in lines
        if isinstance(line.get(key), int | float) and phase in (None, line.get("phase"))
    ]
    return [_number(line, "step") for line in chosen], [_number(line, key) for line in chosen]


def smoothed(values: Sequence[float], memory: int = _SMOOTHING_STEPS) -> list[float]:
    """Exponential mean with the start's bias taken out, so that a constant stays itself."""
    decay, total, weight, result = 1 - 1 / memory, 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


def _number(line: dict[str, Json], key: str) -> float:
    value = line[key]
    assert isinstance(value, int | float), f"{key} of {line} is no number"
    return float(value)


def _prepare(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=12, fontweight="bold")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("reward, accuracy", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dde1e7", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(x=0.03)


def _draw_sft(axes: Axes, loss: Points, last_step: float) -> None:
    axes.axvspan(0, last_step, color=_FAINT, zorder=0)
    beside = axes.twinx()
    beside.plot(*loss, color=_LOSS, linewidth=1.2)
    beside.set_ylim(bottom=0)
    beside.set_ylabel("SFT loss, nats a token", color=_LOSS)
    beside.tick_params(axis="y", colors=_LOSS)
    beside.spines["top"].set_visible(False)
    axes.plot([], [], color=_LOSS, linewidth=1.2, label="SFT loss (right)")
    for x, name, align in ((last_step / 2, "SFT", "center"), (last_step, "  RL", "left")):
        axes.annotate(name, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(0, -4),
                      textcoords="offset points", ha=align, va="top", color=_INK, fontsize=9)  # fmt: skip


def _draw_reward(axes: Axes, reward: Points) -> None:
    steps, values = reward
    if not steps:
        return
    axes.plot(steps, values, color=_REWARD, alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(values), color=_REWARD, linewidth=2.2, label="mean reward of samples")


def _draw_accuracy(axes: Axes, accuracy: Points, named: set[float]) -> None:
    """Values are written at the first and last step and at those of ``named``."""
    steps, values = accuracy
    if not steps:
        return
    axes.plot(steps, values, color=_ACCURACY, linewidth=1.2, linestyle="--", marker="o", markersize=7,
              markeredgecolor="white", label="held-out accuracy, greedy")  # fmt: skip
    for step, value in zip(steps, values, strict=True):
        if step not in named | {steps[0], steps[-1]}:
            continue
        side, align = (7, "left") if step == 0 else (-7, "right")  # step 0 lies at the axis itself
        axes.annotate(f"{value:.1%}", (step, value), xytext=(side, 7), textcoords="offset points",
                      ha=align, color=_ACCURACY, fontsize=9, fontweight="bold")  # fmt: skip
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(1.08, axes.get_ylim()[1]))
