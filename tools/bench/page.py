"""``docs/benchmarks.md`` from the numbers under ``docs/benchmarks/``; nobody edits it by hand.

``python -m mtrl.tools.bench.page`` writes it anew.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
NUMBERS = ROOT / "docs" / "benchmarks"

_HEAD = """# Benchmarks

Written by `tools/bench/`; the numbers it was made from are in `benchmarks/`.
"""

_GRPO_HEAD = """## A GRPO step beside TRL

A Qwen3-MoE with {num_layers} layers, {hidden_size} wide, {num_experts} experts, float32, the same initial weights on both sides;
{num_prompts} prompts of 7 tokens, {num_samples} completions each, of a fixed length (nothing stops early); the reward is a
hash of the tokens; one Adam update from each batch of completions, no KL term.
TRL samples with transformers' `generate`, since its vLLM mode does not run on a CPU; it is measured both as
one process with two threads and as two processes, and mtrl is compared with the faster of them. mtrl runs
`{actor}` with `{rollout}` in two processes of one thread.

In each of {num_rounds} rounds every configuration ran once, in a process of its own, for {num_steps} steps, of which the
first {num_warm} are not counted. *step* is the median over rounds of a run's median step, from one step's end to the next;
*CPU* is user and system time of all processes over a step; *ratio* is TRL's step over mtrl's in the same
round: least, median, greatest.
"""  # noqa: E501


def render(numbers: Mapping[str, Any]) -> str:
    """The page, from the content of ``grpo_step.json``."""
    lines = [_HEAD, _GRPO_HEAD.format(**numbers["setting"])]
    lines += _time_table(numbers)
    lines += ["", "Where mtrl's seconds go (rank 0, median step):", ""]
    names = ("generate_s", "reward_s", "logprobs_s", "train_s", "push_s", "step_s")
    lines += _parts_table(numbers, "mtrl", names)
    lines += ["", "and TRL's:", ""]
    lines += _parts_table(numbers, "trl", ("generate_s", "train_s", "step_s"))
    about = numbers["about"]
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items()), ""]
    return "\n".join(lines)


def step_s(run: Mapping[str, Any], num_warm: int) -> float:
    """Median wall seconds of a run's counted steps."""
    return float(median(run["wall_s"][num_warm:]))


def rounds(numbers: Mapping[str, Any], num_tokens: int) -> list[dict[str, Mapping[str, Any]]]:
    """The runs of each round at this completion length, by configuration."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for run in numbers["runs"]:
        if run["num_tokens"] == num_tokens:
            found.setdefault(run["round"], {})[run["name"]] = run
    return [found[number] for number in sorted(found)]


def fastest_trl(numbers: Mapping[str, Any], num_tokens: int) -> str:
    """The name of TRL's configuration with the smallest median step at this completion length."""
    per_round, num_warm = rounds(numbers, num_tokens), numbers["setting"]["num_warm"]
    names = [name for name in per_round[0] if name.startswith("trl")]
    return min(names, key=lambda name: median(step_s(each[name], num_warm) for each in per_round))


def _time_table(numbers: Mapping[str, Any]) -> list[str]:
    num_warm = numbers["setting"]["num_warm"]
    lines = ["| tokens | | step | CPU | ratio |", "|---:|---|---:|---:|---:|"]
    for num_tokens in numbers["setting"]["lengths"]:
        per_round = rounds(numbers, num_tokens)
        rival = fastest_trl(numbers, num_tokens)
        ratios = sorted(step_s(each[rival], num_warm) / step_s(each["mtrl"], num_warm) for each in per_round)
        for name in per_round[0]:
            wall = median(step_s(each[name], num_warm) for each in per_round)
            cpu = median(median(each[name]["cpu_s"][num_warm:]) for each in per_round)
            shown = f"{ratios[0]:.2f} {median(ratios):.2f} {ratios[-1]:.2f}" if name == "mtrl" else ""
            lines.append(f"| {num_tokens} | {name} | {wall:.2f} s | {cpu:.2f} s | {shown} |")
    return lines


def _parts_table(numbers: Mapping[str, Any], system: str, names: Sequence[str]) -> list[str]:
    num_warm = numbers["setting"]["num_warm"]
    lines = [f"| tokens | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
    for num_tokens in numbers["setting"]["lengths"]:
        which = "mtrl" if system == "mtrl" else fastest_trl(numbers, num_tokens)
        steps = [part for each in rounds(numbers, num_tokens) for part in each[which]["parts"][num_warm:]]
        values = " | ".join(f"{median(step.get(name, 0.0) for step in steps):.3f}" for name in names)
        lines.append(f"| {num_tokens} | {values} |")
    return lines


def write() -> None:
    """Write the page from the committed numbers."""
    numbers = json.loads((NUMBERS / "grpo_step.json").read_text(encoding="utf-8"))
    PAGE.write_text(render(numbers), encoding="utf-8")


if __name__ == "__main__":
    write()
