"""Whether a quickstart did what the README promises; ``make test`` runs this on its summary.json."""

import json
import sys
from pathlib import Path

MIN_EVAL_PROMPTS = 200
AFTER_SFT = (0.10, 0.60)
AFTER_GRPO = 0.90
MAX_MEMORY_BYTES = 6 * 10**9


def problems(summary: dict[str, float]) -> list[str]:
    """What is wrong with a summary, one line each; accuracies are shares of 1."""
    sft, grpo = summary["accuracy_after_sft"], summary["accuracy_after_grpo"]
    found = []
    if summary["num_eval_prompts"] < MIN_EVAL_PROMPTS:
        found.append(f"evaluated on {summary['num_eval_prompts']} prompts, {MIN_EVAL_PROMPTS} are needed")
    if not AFTER_SFT[0] <= sft <= AFTER_SFT[1]:
        found.append(f"accuracy after SFT is {sft:.1%}, not in {AFTER_SFT[0]:.0%} to {AFTER_SFT[1]:.0%}")
    if grpo < AFTER_GRPO:
        found.append(f"accuracy after GRPO is {grpo:.1%}, below {AFTER_GRPO:.0%}")
    if summary["peak_memory_bytes"] > MAX_MEMORY_BYTES:
        found.append(f"peak memory is {summary['peak_memory_bytes'] / 1e9:.1f} GB, above 6 GB")
    return found


def main(path: str) -> int:
    """Print the verdict on the summary at ``path``; 0 when all is well."""
    summary = json.loads(Path(path).read_text())
    found = problems(summary)
    for line in found:
        print(f"quickstart: {line}")
    if not found:
        sft, grpo = summary["accuracy_after_sft"], summary["accuracy_after_grpo"]
        seconds, gigabytes = summary["seconds_total"], summary["peak_memory_bytes"] / 1e9
        print(f"quickstart: {sft:.1%} after SFT, {grpo:.1%} after GRPO, {seconds:.0f} s, {gigabytes:.1f} GB")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
