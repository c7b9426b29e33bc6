"""Kill, starve and damage runs at every point, and write ``docs/torture.json`` and ``docs/torture.md``.

``make torture`` runs all of it, in an hour or two on two cores. Results are kept in ``runs/torture`` as they
come: started again, it goes on with what is left, as long as the commit is the same.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.distributed.world import ROOT, World
from tests.torture.matrix import JOBS, Torture

KEPT = ROOT / "runs" / "torture" / "trials.jsonl"
PAGE = ROOT / "docs" / "torture.md"
ABOUT = """# Kills, full disks and damaged files

Small runs save after every step. Each trial stops one at one point, by a real SIGKILL around the real system
call or by an error of the disk, resumes it, and compares metrics, weights, masters and moments with the run
that never stopped: bit by bit. Every checkpoint that can be seen after the fault must be whole. `kill` ends
one rank, `kill all` every rank, `half` the rank in the middle of a write; ENOSPC and EIO fail the call and
all writes after it, and must be told. Damage changes one file of the newest checkpoint: it must be noticed
and named, and the checkpoint before it offered. Trials that earlier calls made at the same commit are kept.
"""


def main() -> None:
    """Run what is left, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=[job.name for job in JOBS], help="which jobs")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th trial")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if not options.render:
        run_all(options.jobs, options.every)
    numbers = json.loads(PAGE.with_suffix(".json").read_text())
    PAGE.write_text(page(numbers))
    sys.exit(1 if any(row["wrong"] for row in numbers["trials"]) else 0)


def run_all(names: list[str], every: int) -> None:
    """Every trial of the jobs that has no result yet."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    commit = _git("rev-parse", "--short", "HEAD")
    rows = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    rows = [row for row in rows if row["commit"] == commit]
    done = {_key(row) for row in rows}
    start, world = time.monotonic(), World()
    with tempfile.TemporaryDirectory() as folder, KEPT.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        for job in JOBS:
            if job.name not in names:
                continue
            torture = Torture(world, Path(folder), job)
            for what, way, wrong in torture.damages():
                rows.append({"job": job.name, "action": way, "what": what, "wrong": wrong, "commit": commit})
            trials, num_run, began = list(torture.trials())[::every], 0, time.monotonic()
            for number, trial in enumerate(trials, start=1):
                row = {"job": job.name, "rank": trial.rank, "number": trial.number, "what": trial.what}
                row |= {"action": trial.action, "commit": commit}
                if _key(row) in done:
                    continue
                row["wrong"] = torture.run(trial)
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                num_run += 1
                left = (time.monotonic() - began) / num_run * (len(trials) - number) / 60
                print(
                    f"{number}/{len(trials)}  {trial}  {row['wrong'] or 'holds'}  {left:.0f} min", flush=True
                )
    world.close()
    about = {
        "command": " ".join(["python -m tests.torture.run_torture", *sys.argv[1:]]),
        "commit": commit, "date": time.strftime("%Y-%m-%d"), "minutes": (time.monotonic() - start) / 60,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {n: version(n) for n in ("torch", "megatron-core", "transformers")},
        "python": platform.python_version(), "trials": rows,
    }  # fmt: skip
    PAGE.with_suffix(".json").write_text(json.dumps(about, indent=0) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["job"], row.get("rank"), row.get("number"), row["action"], row["what"]


def page(numbers: dict[str, Any]) -> str:
    """The whole page, from the raw numbers."""
    rows = numbers["trials"]
    stacks = ", ".join(f"{name} {value}" for name, value in numbers["versions"].items())
    points = {(row["job"], row["rank"], row["number"]) for row in rows if "rank" in row}
    wrong = [row for row in rows if row["wrong"]]
    text = [
        ABOUT,
        f"`{numbers['command']}` at commit `{numbers['commit']}`, {numbers['date']}, {numbers['machine']}, "
        f"Python {numbers['python']}, {stacks}; {numbers['minutes']:.0f} minutes. "
        "Raw: [torture.json](torture.json).\n",
        f"{len(rows)} trials at {len(points)} points of runs and in files: "
        f"{len(rows) - len(wrong)} hold, {len(wrong)} do not.\n",
        "| run | layout and options | what was done | trials | hold |",
        "|---|---|---|---|---|",
    ]
    arguments = {
        job.name: " ".join(f"`{each}`".replace("|", "\\|") for each in job.arguments[1:]) for job in JOBS
    }
    counts = Counter((row["job"], row["action"]) for row in rows)
    failed = Counter((row["job"], row["action"]) for row in wrong)
    for (job, action), count in counts.items():
        text.append(f"| {job} | {arguments[job]} | {action} | {count} | {count - failed[(job, action)]} |")
    text += [f"\n- {row['job']}, {row['action']}, {row['what']}: {row['wrong']}" for row in wrong]
    return "\n".join(text) + "\n"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
