"""tools/bench/gpu.py itself, on a CPU: every stage that can run without a GPU does, in small."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mtrl.parallel.capabilities import Machine, Survey
from mtrl.parallel.errors import ConfigError
from mtrl.tools.bench import gpu, gpu_page, gpu_sizes, gpu_stages

pytestmark = pytest.mark.one_stack
KERNEL_SHAPES = ("128x256x384", "128x256x384 outliers", "256x128x128", "256x128x128 outliers")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    files = ["--json", str(folder / "gpu.json"), "--page", str(folder / "gpu.md")]
    assert gpu.main(["--size", "tiny", "--device", "cpu", "--limit-s", "280", *files]) == 0
    return folder


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((written / "gpu.json").read_text())
    return found


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers_in(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers_in(each)]
    return [value] if isinstance(value, (int, float)) else []


def rows_of(report: dict[str, Any], stage: str, status: str) -> set[str]:
    return {name for name, row in report["stages"][stage].items() if row["status"] == status}


def test_everything_that_a_cpu_can_run_has_run(report: dict[str, Any]) -> None:
    failed = {
        (stage, name): row["reason"]
        for stage, rows in report["stages"].items()
        for name, row in rows.items()
        if row["status"] == "failed"
    }
    assert not failed
    assert rows_of(report, "ceiling", "done") >= {"bf16", "copy", "memory"}
    assert rows_of(report, "parity", "done") >= {*gpu.PARITY, *(f"CPU {way}" for way in gpu.PARITY)}
    assert rows_of(report, "steps", "done") >= {way for way in gpu.TINY_STEPS if not gpu.is_te(way)}
    assert rows_of(report, "fp8", "done") == {
        f"{path} {shape}" for path in ("reference", "block_sums") for shape in KERNEL_SHAPES
    }
    assert rows_of(report, "fused", "done") == {
        "log-probabilities megatron", "log-probabilities mtrl.logprobs", "rotation megatron",
    }  # fmt: skip
    assert rows_of(report, "push", "done") == {"experts stacked", "experts one by one"}


def test_every_number_is_finite(report: dict[str, Any]) -> None:
    found = numbers_in([report["stages"], report["summary"]])
    assert len(found) > 100 and all(math.isfinite(number) for number in found)


def test_what_did_not_run_names_its_obstacle(report: dict[str, Any]) -> None:
    reasons = {
        name: row["reason"]
        for stage in ("parity", "steps")
        for name, row in report["stages"][stage].items()
        if row["status"] == "obstacle"
    }
    expected = report["survey"]["packages"]["transformer-engine"]["reason"]
    assert set(reasons) == {way for way in (*gpu.TE_PARITY, *gpu.TINY_STEPS) if gpu.is_te(way)}
    assert set(reasons.values()) == {f"transformer-engine: {expected}"} and expected


def test_two_processes_on_one_kind_of_device_give_one_loss(report: dict[str, Any]) -> None:
    for way in gpu.PARITY:
        fact = report["summary"]["parity"][way]
        assert fact["agrees"] and fact["differs_by"] < 1e-6
        losses = report["stages"]["parity"][way]["losses"]
        assert losses[-1] < 0.8 * losses[0]  # so a wrong gradient would show


def test_every_precision_learns_the_same_batch_on_both_sides(report: dict[str, Any]) -> None:
    for name in rows_of(report, "steps", "done"):
        row = report["stages"]["steps"][name]
        # ln 512 of the vocabulary before anything was learned.
        assert row["losses"][0] == pytest.approx(math.log(512), rel=0.02)
        assert row["losses"][-1] < row["losses"][0]
        assert set(report["summary"]["steps"][name]) >= {"times_transformers", "times_bf16", "mfu"} - (
            {"times_bf16"} if name == "torch_native fp32" else set()
        )


def test_the_reference_of_fp8_is_within_the_format_and_pushed_copies_are_equal(
    report: dict[str, Any],
) -> None:
    assert set(report["summary"]["fp8"]) == {"reference", "block_sums"}
    assert all(fact["within_bound"] for fact in report["summary"]["fp8"].values())
    assert 0.1 < report["summary"]["fp8"]["reference"]["of_bound"] <= 1
    # The same arithmetic in the same order.
    assert report["stages"]["fused"]["log-probabilities mtrl.logprobs"]["differs_by"] == 0.0
    for row in report["stages"]["push"].values():
        assert row["equal"] and row["fused_copies"] < row["copies"] and row["engine"] == "no engine"


def test_the_page_holds_every_stage_and_every_reason(written: Path) -> None:
    page = (written / "gpu.md").read_text()
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Ceiling", "Parity", "Training steps", "FP8 kernels", "Fused kernels", "Copies of a push",
        "What did not run",
    ]  # fmt: skip
    assert "no GPU: this only tries the script" in page
    report = json.loads((written / "gpu.json").read_text())
    report["about"]["gpu"] = "a GPU"  # then what was asked is told, of ways that ran
    asked = gpu_page.page(report).partition("## What was asked")[2].partition("##")[0]
    assert [row.split(" | ")[0] for row in asked.splitlines() if "torch_native" in row] == [
        "| MFU, torch_native bf16",
        "| times transformers, torch_native bf16",
    ]
    assert page.count("transformer-engine: ") == len([*gpu.TE_PARITY, "steps bf16", "steps fp8"])


@pytest.mark.parametrize("shape", [*gpu_stages.TINY_SHAPES, *gpu_stages.FULL_SHAPES])
def test_scales_lie_as_torchs_product_of_blocks_wants_them(shape: tuple[int, int, int]) -> None:
    """On torch's meta device, which checks shapes and strides as a GPU does and computes nothing."""
    tokens, outputs, inputs = shape
    x, weight = (torch.empty(rows, inputs, dtype=torch.bfloat16, device="meta") for rows in (tokens, outputs))
    dy = torch.empty(tokens, outputs, dtype=torch.bfloat16, device="meta")
    found = gpu_stages.scaled_mm_product(gpu_stages.Products(x=x, weight=weight, dy=dy))()
    assert found["forward"].shape == (tokens, outputs) and found["forward"].dtype == torch.bfloat16


def test_a_process_that_ends_badly_or_hangs_is_a_row_with_the_reason() -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    crash = ["sh", "-c", "echo the cause >&2; exit 3"]
    assert gpu.run_limited(crash, environment, 30.0) == "ended with 3: the cause"
    assert gpu.run_limited(["sh", "-c", "kill -SEGV $$"], environment, 30.0).startswith("ended with -11")
    assert gpu.run_limited(["sh", "-c", "sleep 60"], environment, 0.5) == "still ran after 0.5 s"


def test_the_size_grows_with_the_memory_and_stays_within_its_share_of_it() -> None:
    assert gpu_sizes.QWEN3_30B_A3B.num_weights == 30_532_122_624  # as published
    way = gpu_sizes.Way(side="torch_native", precision="bf16")
    weights = []
    for free in (40 * 10**9, 80 * 10**9, 141 * 10**9):
        size = gpu_sizes.filling(free)
        assert gpu_sizes.estimate_bytes(size, way, fused_adam=False) <= gpu_sizes.FILL * free
        weights.append(size.num_weights)
    assert weights == sorted(set(weights))
    # On an H200, most of it.
    assert gpu_sizes.estimate_bytes(size, way, fused_adam=False) > 0.7 * free
    with pytest.raises(ConfigError, match=r"2\.0 GB are free, .* needs 21\.9 GB"):
        gpu_sizes.filling(2 * 10**9)


def test_without_a_gpu_it_says_how_to_try_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = Survey(machine=Machine(gpu=None, sm=None, cuda=None), packages=(), features={})
    monkeypatch.setattr(gpu, "survey", lambda: nothing)  # also on a machine that has one
    with pytest.raises(SystemExit, match="found no GPU; to try the script itself: --size tiny --device cpu"):
        gpu.main(["--json", str(tmp_path / "gpu.json"), "--page", str(tmp_path / "gpu.md")])


def test_a_cpu_is_not_asked_to_fill_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu"])
    assert ended.value.code == 2 and "needs --size tiny" in capsys.readouterr().err
