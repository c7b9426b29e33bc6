import io
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtrl.config_load import load_config
from mtrl.metrics import (
    EvaluationMetrics,
    MetricsWriter,
    Phase,
    StepMetrics,
    StepSeconds,
    Stopwatch,
    peak_memory,
)
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import MissingPackageError
from mtrl.plots import plot_rewards, points, smoothed
from mtrl.progress import (
    BarProgress,
    ComparisonRow,
    LineProgress,
    SilentProgress,
    comparison_table,
    describe_step,
    format_duration,
    open_progress,
)
from mtrl.run_folder import Json, RunFolder, open_run_folder, read_lines

ROOT = Path(__file__).resolve().parents[2]
STABLE_KEYS = {
    *("step", "loss", "grad_norm", "lr", "num_tokens", "reward_mean", "completion_length_mean"),
    *("logprob_abs_diff_max", "k3_kl", "policy_version", "push_bytes_received"),
    *("generate_s", "reward_s", "logprobs_s", "train_s", "push_s", "step_s"),
}


def sft_step(step: int, loss: float = 2.0) -> StepMetrics:
    seconds = StepSeconds(train_s=0.4, step_s=0.5)
    return StepMetrics(
        step=step, phase="sft", loss=loss, grad_norm=1.0, lr=1e-3, num_tokens=500, seconds=seconds
    )


def grpo_step(step: int, reward: float = 0.5) -> StepMetrics:
    return StepMetrics(
        step=step,
        phase="grpo",
        loss=0.01,
        grad_norm=0.2,
        lr=1e-6,
        num_tokens=1000,
        seconds=StepSeconds(generate_s=1.0, train_s=0.5, step_s=2.0),
        reward_mean=reward,
        completion_length_mean=31.5,
        logprob_abs_diff_max=1e-6,
        k3_kl=1e-12,
        policy_version=step,
        push_bytes_received=0,
    )


def evaluation(step: int, accuracy: float, phase: Phase = "grpo") -> EvaluationMetrics:
    return EvaluationMetrics(step=step, phase=phase, accuracy=accuracy, num_prompts=200, evaluation_s=1.0)


def opened(tmp_path: Path, rank: int = 0, *overrides: str) -> tuple[RunFolder, MetricsWriter]:
    config = load_config(
        ROOT / "configs" / "sft_qwen3_moe.yaml", [f"output_dir={tmp_path / 'run'}", *overrides]
    )
    folder = open_run_folder(config, rank=rank)
    return folder, MetricsWriter(folder, config)


# ---- records ----


def test_a_step_of_rl_has_every_stable_key_even_where_the_value_is_zero() -> None:
    record = grpo_step(3).to_dict()
    assert record.keys() >= STABLE_KEYS
    assert record["push_bytes_received"] == 0 and record["reward_s"] == 0.0


def test_a_step_of_sft_has_no_key_that_does_not_apply() -> None:
    record = sft_step(3).to_dict()
    optional = {spec.name for spec in fields(StepMetrics) if spec.default is None}
    assert optional and not optional & record.keys() and "seconds" not in record


def test_tokens_per_second_counts_the_whole_step() -> None:
    assert grpo_step(1).tokens_per_s == 500.0 and grpo_step(1).to_dict()["tokens_per_s"] == 500.0


# ---- time and memory ----


def test_the_stopwatch_adds_repeated_activities_and_counts_the_rest_in_the_step() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("generate_s"):
            time.sleep(0.02)
    time.sleep(0.02)
    seconds = watch.read()
    # Sleeping never takes less than asked; how much more is the machine's affair.
    assert seconds.generate_s >= 0.04 and seconds.step_s >= seconds.generate_s + 0.02
    assert seconds.train_s == 0.0


def test_the_stopwatch_counts_an_activity_that_raises() -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch("push_s"):
        time.sleep(0.01)
        raise KeyError
    assert watch.read().push_s >= 0.01


def test_the_stopwatch_waits_for_the_device_before_each_reading() -> None:
    calls: list[int] = []
    watch = Stopwatch(synchronize=lambda: calls.append(1))
    with watch("train_s"):
        pass
    watch.read()
    assert len(calls) == 4


_HOLD_64_MB = """
from mtrl.metrics import _peak_resident_bytes
before = _peak_resident_bytes()
block = bytearray(b"\\1" * 32_000_000) + bytearray(b"\\1" * 32_000_000)
during = _peak_resident_bytes()
del block
print(before, during, _peak_resident_bytes())
"""


def test_peak_memory_is_the_most_this_process_held_and_not_what_its_parent_did() -> None:
    block = bytearray(b"\1" * 150_000_000)  # what the kernel's ru_maxrss would hand down to the child
    done = subprocess.run(
        [sys.executable, "-c", _HOLD_64_MB], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, during, after = map(int, done.stdout.split())
    assert 1_000_000 < before < len(block)
    assert during >= before + 64_000_000 and after >= during


def test_peak_memory_has_a_device_part_only_where_there_is_a_gpu() -> None:
    peak = peak_memory()
    assert peak.host_bytes > 1_000_000
    assert (peak.device_bytes > 0) <= (current_device().kind == "cuda")


# ---- where they go ----


def test_steps_and_evaluations_go_to_their_lines_and_to_tensorboard(tmp_path: Path) -> None:
    folder, writer = opened(tmp_path)
    with writer:
        writer.write_step(sft_step(1, loss=2.5))
        writer.write_step(grpo_step(2, reward=0.25))
        writer.write_evaluation(evaluation(2, 0.75))
    assert read_lines(folder.metrics_path) == [
        sft_step(1, loss=2.5).to_dict(),
        grpo_step(2, reward=0.25).to_dict(),
    ]
    assert read_lines(folder.evaluations_path) == [evaluation(2, 0.75).to_dict()]
    events = EventAccumulator(str(folder.tensorboard_path))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["sft/loss"] == [(1, 2.5)] and found["grpo/reward_mean"] == [(2, 0.25)]
    assert found["evaluation/accuracy"] == [(2, 0.75)] and "grpo/phase" not in found


def test_tensorboard_off_leaves_no_events(tmp_path: Path) -> None:
    folder, writer = opened(tmp_path, 0, "logging.tensorboard=false")
    with writer:
        writer.write_step(sft_step(1))
    assert not folder.tensorboard_path.exists() and len(read_lines(folder.metrics_path)) == 1


def test_ranks_above_zero_write_nothing(tmp_path: Path) -> None:
    folder, writer = opened(tmp_path, 1, "logging.wandb=true")
    with writer:
        writer.write_step(sft_step(1))
        writer.write_evaluation(evaluation(1, 0.5))
    assert not folder.path.exists()


def test_wandb_where_it_is_not_installed_is_refused_with_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python itself marks a module as not there
    with pytest.raises(MissingPackageError, match="pip install wandb"):
        opened(tmp_path, 0, "logging.wandb=true", "logging.tensorboard=false")


# ---- the plot ----


def pixels(path: Path) -> tuple[int, int, bytes]:
    """Width, height and the decompressed rows of a PNG with 8-bit RGBA and no interlacing."""
    data, place, body = path.read_bytes(), 8, b""
    width, height = struct.unpack(">II", data[16:24])
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    return width, height, zlib.decompress(body)


@pytest.mark.parametrize("what", ["both phases", "rl only", "no evaluations", "nothing"])
def test_the_plot_is_drawn_from_whatever_there_is(tmp_path: Path, what: str) -> None:
    folder, writer = opened(tmp_path, 0, "logging.tensorboard=false")
    for step in range(1, 30 if what != "nothing" else 1):
        is_sft = what == "both phases" and step <= 20
        writer.write_step(sft_step(step, 4 / step) if is_sft else grpo_step(step, step / 30))
        if what != "no evaluations" and step % 10 == 9:
            writer.write_evaluation(evaluation(step, step / 30))
    plot_rewards(folder.metrics_path, folder.evaluations_path, folder.plot_path, title=what)
    width, height, rows = pixels(folder.plot_path)
    assert (width, height) == (1350, 750) and len(set(rows)) > 10


def test_points_are_the_lines_that_have_the_key_in_the_phase() -> None:
    lines: list[dict[str, Json]] = [
        sft_step(1).to_dict(),
        grpo_step(2, 0.5).to_dict(),
        {"step": 3, "loss": None, "phase": "grpo"},
    ]
    assert points(lines, "reward_mean") == ([2.0], [0.5])
    assert points(lines, "loss", phase="sft") == ([1.0], [2.0])
    assert points(lines, "loss", phase="grpo") == ([2.0], [0.01])


def test_smoothing_keeps_a_constant_and_stays_within_what_it_smooths() -> None:
    assert smoothed([0.3] * 20) == pytest.approx([0.3] * 20, abs=1e-12)  # float64 rounding
    values = [0.0, 1.0, 0.0, 0.0, 1.0]
    assert smoothed(values)[0] == 0.0 and all(0 <= value <= 1 for value in smoothed(values))


# ---- progress ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_terminals_lines_for_logs_and_nothing_for_other_ranks() -> None:
    bar = open_progress("auto", rank=0, stream=Terminal())
    bar.close()
    assert isinstance(bar, BarProgress)
    assert isinstance(open_progress("auto", rank=0, stream=io.StringIO()), LineProgress)
    assert isinstance(open_progress("lines", rank=0, stream=Terminal()), LineProgress)
    assert isinstance(open_progress("none", rank=0, stream=Terminal()), SilentProgress)
    assert isinstance(open_progress("bar", rank=1, stream=Terminal()), SilentProgress)


def test_lines_come_first_last_and_every_five_seconds_with_the_time_left() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = LineProgress(stream, clock=lambda: now[0])
    progress.start_phase("GRPO", 10)
    for step in range(1, 11):
        now[0] += 2.0
        progress.update(grpo_step(step, reward=0.25))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[1] == "GRPO  4/10  reward 0.250  loss 0.0100  500 tokens/s  12s left"
    assert lines[3].endswith("0s left")


def test_a_second_phase_counts_anew() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = LineProgress(stream, clock=lambda: now[0])
    for name in ("SFT", "GRPO"):
        progress.start_phase(name, 2)
        for step in (1, 2):
            now[0] += 1.0
            progress.update(sft_step(step))
    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [
        ["SFT", "1/2"],
        ["SFT", "2/2"],
        ["GRPO", "1/2"],
        ["GRPO", "2/2"],
    ]


def test_the_bar_shows_count_reward_and_rate_and_leaves_the_cursor_visible() -> None:
    stream = Terminal()
    progress = BarProgress(Console(file=stream, width=120, force_terminal=True, color_system=None))
    progress.start_phase("GRPO", 2)
    progress.update(grpo_step(1, reward=0.25))
    progress.message("evaluation [1]: 75 %")
    progress.update(grpo_step(2, reward=0.5))
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "2/2" in shown and "reward 0.500" in shown and "500 tokens/s" in shown
    assert "evaluation [1]: 75 %" in shown and shown.rstrip().endswith("\x1b[?25h")


def test_a_step_without_reward_shows_none() -> None:
    assert describe_step(sft_step(1)) == "loss 2.0000  1,000 tokens/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3599.9, "1h00m"), (7625, "2h07m")]
)
def test_durations_round_over_to_the_next_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_closing_table_holds_both_columns() -> None:
    stream = io.StringIO()
    rows = [ComparisonRow(name="accuracy", before="41.0 %", after="97.5 %")]
    Console(file=stream, width=80).print(comparison_table("Quickstart", rows, before="SFT", after="GRPO"))
    shown = stream.getvalue()
    assert all(part in shown for part in ("Quickstart", "SFT", "GRPO", "accuracy", "41.0 %", "97.5 %"))
