"""Everything that only a GPU can show, in one command: ``python tools/bench/gpu.py``, 8 minutes on an H200.

    ceiling   products of bf16 and FP8 squares, copies within the device's memory
    parity    losses of five steps on the GPU against the same on the CPU, both backends, fp32, bf16, FP8
    steps     training steps of a Qwen3-MoE that fills the card, beside transformers' model on the same work
    fp8       linears in FP8 blocks against float64, the format's bound and our reference
    fused     log-probabilities and rotary positions by each kernel: time and memory
    push      the copies of a push, without an engine
    survey    every accelerated package: is it there, what stands in its way

Each part runs in a process of its own with a time limit, so that one that crashes is a row and not the end;
results are written after each. Writes ``docs/benchmarks/gpu.json`` and ``docs/gpu.md``; on a CPU, where it is
only the script that is tried (``--size tiny --device cpu``), both in ``runs/gpu``.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, "") and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Without torch: the process that waits must not take memory of the GPU.
from mtrl.parallel.capabilities import Survey, survey  # noqa: E402
from mtrl.tools.bench import gpu_page  # noqa: E402

STAGES = ("survey", "ceiling", "parity", "steps", "fp8", "fused", "push")
PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
LIMITS_S = {"ceiling": 60.0, "parity": 75.0, "steps": 90.0, "fp8": 75.0, "fused": 60.0, "push": 60.0}
"""Of one process; the slowest imports take a quarter of it."""
PARITY = ("torch_native fp32", "torch_native bf16", "torch_native fp8_blockwise")
TE_PARITY = ("transformer_engine bf16", "transformer_engine fp8_blockwise")
FULL_STEPS = (
    "transformers bf16", "torch_native bf16",
    "transformer_engine bf16", "transformer_engine fp8_blockwise", "transformer_engine fp8_delayed",
)  # fmt: skip
TINY_STEPS = (
    "transformers bf16",
    "torch_native fp32", "torch_native bf16", "torch_native fp8_blockwise",
    "transformer_engine bf16", "transformer_engine fp8_blockwise",
)  # fmt: skip
NEEDS = {"transformer_engine": "transformer-engine", "torch_native": "megatron-core"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process. ``prefix`` stands before the names of its rows; ``on_cpu`` hides the GPU from it."""

    stage: str
    ways: tuple[str, ...] = ()
    prefix: str = ""
    on_cpu: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--size", choices=("auto", "tiny"), default="auto", help="auto: fill the card")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU")
    parser.add_argument("--limit-s", type=float, default=480.0, help="for everything")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--page", type=Path, help="where to write the page")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--child", nargs=2, metavar=("STAGE", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--ways", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--free-bytes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        run_child(options)
        return 0
    if options.device == "cpu" and options.size == "auto":
        parser.error("--device cpu only tries the script: it needs --size tiny")
    folder = ROOT / "runs/gpu" if options.device == "cpu" else ROOT / "docs"
    numbers: Path = options.json or folder / (
        "gpu.json" if options.device == "cpu" else "benchmarks/gpu.json"
    )
    page: Path = options.page or folder / "gpu.md"
    if not options.render:
        measure(options, numbers)
    report = json.loads(numbers.read_text())
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(gpu_page.page(report))
    return 0


def run_child(options: argparse.Namespace) -> None:
    """One stage, in its own process: a line of JSON for each row, as soon as there is one."""
    from mtrl.tools.bench import gpu_sizes, gpu_stages

    stage, file = options.child
    free = options.free_bytes or gpu_stages.memory_row()["free"]
    context = gpu_stages.Context(
        size=gpu_sizes.TINY if options.size == "tiny" else gpu_sizes.filling(free),
        ways=[gpu_sizes.Way.parse(text) for text in options.ways],
        tiny=options.size == "tiny",
    )
    run = gpu_stages.STAGES.get(stage)
    if run is None:
        from mtrl.tools.bench import gpu_fused  # which imports Megatron

        run = gpu_fused.fused
    with Path(file).open("a") as out:
        for name, row in run(context):
            out.write(json.dumps([name, row]) + "\n")
            out.flush()


def measure(options: argparse.Namespace, numbers: Path) -> None:
    """Run every task; ``numbers`` is written anew after each."""
    begin = time.monotonic()
    numbers.parent.mkdir(parents=True, exist_ok=True)
    found = survey()
    report: dict[str, Any] = {"about": about(options, found), "survey": surveyed(found), "stages": {}}
    if options.device == "auto" and found.machine.gpu is None:
        raise SystemExit("gpu.py: found no GPU; to try the script itself: --size tiny --device cpu")
    for task in plan(options):
        rows = report["stages"].setdefault(task.stage, {})
        ready = [way for way in task.ways if not obstacle(found, way)]
        for way in task.ways:
            if way not in ready:
                rows[task.prefix + way] = {"status": "obstacle", "reason": obstacle(found, way)}
        if ready or not task.ways:
            memory = report["stages"].get("ceiling", {}).get("memory", {})
            left_s = options.limit_s - (time.monotonic() - begin)
            rows.update(run_task(task, ready, options, free=memory.get("free", 0), left_s=left_s))
        report["summary"] = gpu_page.summary(report["stages"])
        report["about"]["seconds"] = time.monotonic() - begin
        numbers.write_text(json.dumps(report, indent=1) + "\n")


def plan(options: argparse.Namespace) -> list[Task]:
    """The processes, in order. What fills the card has one for each way, so that none finds the memory of
    another; what is tiny shares one by side, which saves imports.
    """
    tasks = []
    for stage in options.stages:
        if stage == "parity":
            tasks.append(Task(stage=stage, ways=PARITY, prefix="CPU ", on_cpu=True))
            tasks += grouped(stage, PARITY + TE_PARITY, by_side=True)
        elif stage == "steps":
            tiny = options.size == "tiny"
            tasks += grouped(stage, TINY_STEPS if tiny else FULL_STEPS, by_side=tiny)
        elif stage != "survey":
            tasks.append(Task(stage=stage))
    return tasks


def grouped(stage: str, ways: Sequence[str], *, by_side: bool) -> list[Task]:
    """A task for each way, or for each side."""
    if not by_side:
        return [Task(stage=stage, ways=(way,)) for way in ways]
    sides = dict.fromkeys(side_of(way) for way in ways)
    return [Task(stage=stage, ways=tuple(way for way in ways if side_of(way) == side)) for side in sides]


def side_of(way: str) -> str:
    """Who computes."""
    return way.partition(" ")[0]


def is_te(way: str) -> bool:
    """Whether Transformer Engine computes."""
    return side_of(way) == "transformer_engine"


def obstacle(found: Survey, way: str) -> str:
    """Why nothing is run; what Transformer Engine itself refuses is told by its own row."""
    side = side_of(way)
    if side == "transformers":
        return "" if importlib.util.find_spec("transformers") else "transformers: not installed"
    reason = found.package(NEEDS[side]).reason
    return f"{NEEDS[side]}: {reason}" if reason else ""


def run_task(
    task: Task, ways: Sequence[str], options: argparse.Namespace, *, free: int, left_s: float
) -> dict[str, dict[str, Any]]:
    """A task's rows by name; one without a row of its own says how its process ended."""
    limit_s = min(LIMITS_S[task.stage], left_s)
    label = " ".join([task.stage, *ways])
    if limit_s < 5:
        return {
            task.prefix + way: {"status": "failed", "reason": "no time was left"} for way in ways or ["all"]
        }
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows"
        command = [sys.executable, "-W", "ignore", __file__, "--child", task.stage, str(file)]
        command += ["--size", options.size, "--free-bytes", str(free), "--ways", *ways]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if task.on_cpu or options.device == "cpu" else {}
        start = time.monotonic()
        fate = run_limited(command, os.environ | hidden, limit_s)
        seconds = time.monotonic() - start
        lines = file.read_text().splitlines() if file.exists() else []
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        row_name, row = json.loads(line)
        status = "obstacle" if "obstacle" in row else "done"
        reason = {"reason": row.pop("obstacle")} if status == "obstacle" else {}
        rows[task.prefix + row_name] = {"status": status, "process_s": seconds} | reason | row
    if fate:
        missing = [task.prefix + way for way in ways if task.prefix + way not in rows] or [f"end of {label}"]
        rows |= {each: {"status": "failed", "process_s": seconds, "reason": fate} for each in missing}
    print(f"{label}: {fate or 'done'}, {seconds:.1f} s", flush=True)
    return rows


def run_limited(command: Sequence[str], environment: dict[str, str], limit_s: float) -> str:
    """ "" or how it went wrong. What it started ends with it."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"still ran after {limit_s:g} s"
    if child.returncode == 0:
        return ""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    return f"ended with {child.returncode}: {last[:400]}"


def about(options: argparse.Namespace, found: Survey) -> dict[str, Any]:
    """Where, when and what."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    described = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    machine = found.machine
    return {
        "command": f"python tools/bench/gpu.py --size {options.size} --device {options.device} "
        f"--stages {' '.join(options.stages)}",
        "commit": described or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": machine.gpu if options.device == "auto" else None,
        "cuda": ".".join(map(str, machine.cuda)) if machine.cuda else None,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
    }


def installed(name: str) -> str:
    """A distribution's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def surveyed(found: Survey) -> dict[str, Any]:
    """What `mtrl.parallel.capabilities` says of each package and feature: the obstacle, or ""."""
    return {
        "packages": {each.name: {"version": each.version, "reason": each.reason} for each in found.packages},
        "features": found.features,
    }


if __name__ == "__main__":
    sys.exit(main())
