"""SFT of the quickstart in every precision that runs anywhere: do linears in FP8 blocks learn as well?

``python tools/bench/fp8.py`` trains the quickstart's model on its task, by its command and from its weights,
in fp32, bf16 and FP8, for several seeds, and writes ``docs/benchmarks/fp8.json`` and ``docs/fp8.md``. Needs
the task, which ``make quickstart`` makes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mtrl.tools.bench.about import about

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE = ROOT / "docs/benchmarks/fp8.json", ROOT / "docs/fp8.md"
PACKAGES = ("torch", "megatron-core", "transformers")
TASK = Path("runs/arithmetic")
NUM_STEPS = 115  # what the quickstart's SFT takes on average until 47 % of held-out answers are right
REACHED, SMOOTHED = 0.8, 10
WAYS: dict[str, list[str]] = {
    "fp32": ["model.precision=fp32"],
    "bf16": ["model.precision=bf16"],
    "fp8_blockwise": ["model.precision=fp8_blockwise"],
    "fp8_blockwise, gradients in e5m2": ["model.precision=fp8_blockwise", "model.fp8.gradients=e5m2"],
}
AS_SFT = [
    "algorithm.name=sft", f"algorithm.total_steps={NUM_STEPS}", "algorithm.samples_per_step=256",
    "algorithm.warm_start=null", "data.warm_start=null", "data.eval=null", f"data.train={TASK / 'sft.jsonl'}",
    "evaluation.every_steps=0", "actor.optimizer.lr=4.0e-3", "actor.optimizer.min_lr=0.0",
    "actor.optimizer.warmup_steps=20", "actor.optimizer.decay=constant",
    "logging.tensorboard=false", "checkpoint.contents=weights",
]  # fmt: skip


def main() -> None:
    """Train, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if not options.render:
        NUMBERS.write_text(json.dumps(measure(options.seeds), indent=1) + "\n")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))


def measure(seeds: list[int]) -> dict[str, Any]:
    """Every step's loss, by way and seed."""
    return {
        **about(f"python tools/bench/fp8.py --seeds {' '.join(map(str, seeds))}", PACKAGES),
        "losses": {way: {str(seed): losses(way, seed) for seed in seeds} for way in WAYS},
    }


def losses(way: str, seed: int) -> list[float]:
    """The loss of every step of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "mtrl/train.py",
            "configs/quickstart.yaml", *AS_SFT, *WAYS[way], f"seed={seed}", f"output_dir={out}",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [float(step["loss"]) for step in steps]
    assert len(found) == NUM_STEPS
    print(f"{way}, seed {seed}: {mean(found):.4f}", flush=True)
    return found


def page(numbers: dict[str, Any]) -> str:
    """The page, from the content of ``fp8.json``."""
    versions = ", ".join(f"{name} {found}" for name, found in numbers["versions"].items())
    seeds = list(numbers["losses"]["fp32"])
    lines = [
        "# SFT in FP8 blocks",
        "",
        f"The quickstart's SFT: its model and task, {NUM_STEPS} steps on two processes",
        "(`megatron:(attn:d2|ffn:e2)`), the same weights and data for all runs of a seed. FP8 is the",
        "reference in blocks of torch_native (`model.precision: fp8_blockwise`): every product of a layer's",
        "linears takes e4m3 numbers in blocks and adds in fp32, forwards and backwards; weights and",
        "activations are bf16.",
        "",
        f"`{numbers['command']}` at commit `{numbers['commit']}`, {numbers['date']}, {numbers['machine']};",
        f"{versions}. Raw numbers: [fp8.json](benchmarks/fp8.json).",
        "",
        "Mean loss over all steps; in brackets beside bf16 of the same seed.",
        "",
        *_table(numbers["losses"], seeds, mean, "{:.4f}"),
        "",
        f"Steps until the mean loss of {SMOOTHED} steps is below {REACHED}, as the quickstart's at its end.",
        "",
        *_table(numbers["losses"], seeds, _reached, "{:.0f}"),
        "",
        "What fp32 differs from bf16 by is what chance makes of a seed; a single late step's loss says less,",
        "since it falls by half in twenty steps.",
    ]
    return "\n".join([*lines, ""])


def _table(
    losses: Mapping[str, Mapping[str, list[float]]],
    seeds: Sequence[str],
    measure: Callable[[list[float]], float],
    form: str,
) -> list[str]:
    rows = ["| precision | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |"]
    rows.append("|---" * (len(seeds) + 2) + "|")
    for way, runs in losses.items():
        pairs = [(measure(runs[seed]), measure(losses["bf16"][seed])) for seed in seeds]
        pairs.append((mean(found for found, _ in pairs), mean(base for _, base in pairs)))
        cells = [f"{form.format(found)} ({found / base - 1:+.1%})" for found, base in pairs]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


def _reached(losses: list[float]) -> float:
    """The first step by which the last ones are below the threshold; all steps if none is."""
    ends = range(SMOOTHED, len(losses) + 1)
    return next((end for end in ends if mean(losses[end - SMOOTHED : end]) < REACHED), len(losses))


if __name__ == "__main__":
    main()
