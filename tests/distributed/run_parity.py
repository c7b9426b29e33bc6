"""Run the parity suite at length and write ``docs/parity_*.json`` and, from them, ``docs/parity.md``.

``python -m tests.distributed.run_parity`` (``make parity``) runs the wide Qwen3-MoE under all 313 legal
layouts of 1, 2, 3, 4, 6 and 8 ranks, and every family under a set of layouts that covers all features, on the
installed Megatron-Core. ``--render`` only writes the page anew.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.distributed.pairs import WORLD_SIZES, all_families, every_layout
from tests.distributed.parity import BOUNDS, FLOOR_FACTOR, Errors, Pair, measure, write_reference
from tests.distributed.world import ROOT, World, WorldError

PAGE = ROOT / "docs/parity.md"
PACKAGES = ("megatron-core", "torch", "transformers")
PAIRS_PER_WORLD = 12
ABOUT = """# Parity: every layout against transformers

Three optimizer steps with gradient clipping active, from the same Hugging Face weights and global batches:
transformers' model with torch.optim in one process, against mtrl on Megatron-Core under each layout (fp32,
gloo, CPU). Columns are the largest relative differences: of the losses, of the gradient norms before
clipping, of a parameter's first gradient (norm of the difference over norm of the gradient), and of the
weights after three steps (norm of the difference over norm of the update). Bounds: {bounds}; a layout
passes within its bound or {factor} times the floor, whichever is larger. The floor, "one row", is one process
that takes all samples of a step in one microbatch: the same sums in another order.

`v2` is a virtual pipeline of two chunks, `plain` is without the distributed optimizer. Written by
`make parity`; the raw numbers lie beside this page.
"""


def main() -> None:
    """Measure, then write the numbers and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLD_SIZES), help="world sizes to run")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    failed = 0 if options.render else measure_all(options.worlds)
    PAGE.write_text(page())
    sys.exit(1 if failed else 0)


def measure_all(world_sizes: Sequence[int]) -> int:
    """Run every pair of these world sizes; returns how many are beyond their bounds."""
    pairs = [pair for pair in (*every_layout(WORLD_SIZES), *all_families()) if pair.size in world_sizes]
    floors = {toy: Pair(spec="megatron:d1", toy=toy, max_tokens=1000) for toy in {pair.toy for pair in pairs}}
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder, world = Path(name), World()
        for toy in floors:
            write_reference(folder, toy)
        floor_errors = dict(zip(floors, _measured(world, folder, list(floors.values())), strict=True))
        for done, (pair, errors) in enumerate(_each(world, folder, pairs), start=1):
            floor = floor_errors[pair.toy]
            assert isinstance(floor, Errors)
            beyond = errors.beyond(floor) if isinstance(errors, Errors) else {}
            rows.append(_row(pair, errors, beyond))
            elapsed = time.monotonic() - start
            left = elapsed / done * (len(pairs) - done)
            print(f"{done}/{len(pairs)}  {pair}  {_verdict(rows[-1])}  {left / 60:.0f} min left", flush=True)
            if done % PAIRS_PER_WORLD == 0 or done == len(pairs):  # an interrupted run leaves what it had
                numbers = _about(world_sizes, elapsed) | {"num_planned": len(pairs), "pairs": rows}
                numbers["floors"] = [_row(floors[toy], floor_errors[toy], {}) for toy in sorted(floors)]
                target = PAGE.with_name(f"parity_megatron_{version('megatron-core')}.json")
                target.write_text(json.dumps(numbers, indent=0) + "\n")
        world.close()
    return sum(_verdict(row) == "BEYOND" or _verdict(row) == "FAILED" for row in rows)


def _each(world: World, folder: Path, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Errors | str]]:
    ordered = sorted(pairs, key=lambda pair: (pair.size, pair.spec, pair.num_chunks, pair.toy))
    for _, same_size in groupby(ordered, key=lambda pair: pair.size):
        members = list(same_size)
        for start in range(0, len(members), PAIRS_PER_WORLD):
            some = members[start : start + PAIRS_PER_WORLD]
            yield from zip(some, _measured(world, folder, some), strict=True)


def _measured(world: World, folder: Path, pairs: Sequence[Pair]) -> list[Errors | str]:
    """As `measure`; where a world fails, its pairs one by one, so that only the culprit counts as failed."""
    try:
        return measure(world, folder, pairs)
    except WorldError as error:
        if len(pairs) == 1:
            return [f"FAILED {str(error)[-1500:]}"]
        return [found for pair in pairs for found in _measured(world, folder, [pair])]


def _row(pair: Pair, errors: Errors | str, beyond: dict[str, float]) -> dict[str, Any]:
    found = asdict(errors) if isinstance(errors, Errors) else {"said": errors}
    return {**asdict(pair), "name": str(pair), **found, "beyond": beyond}


def _verdict(row: dict[str, Any]) -> str:
    if "said" in row:
        return "FAILED" if row["said"].startswith("FAILED") else "refused"
    return "BEYOND" if row["beyond"] else "agrees"


def _about(world_sizes: Sequence[int], seconds: float) -> dict[str, Any]:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    arguments = (
        "" if list(world_sizes) == list(WORLD_SIZES) else f" --worlds {' '.join(map(str, world_sizes))}"
    )
    return {
        "command": f"python -m tests.distributed.run_parity{arguments}",
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "minutes": round(seconds / 60, 1),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def page() -> str:
    """The page of all numbers that lie in docs/."""
    bounds = ", ".join(f"{name.replace('_', ' ')} {bound:.0e}" for name, bound in BOUNDS.items())
    parts = [ABOUT.format(bounds=bounds, factor=FLOOR_FACTOR)]
    for file in sorted(PAGE.parent.glob("parity_megatron_*.json")):
        numbers = json.loads(file.read_text())
        parts.append("\n".join(_section(numbers, file.name)))
    return "\n".join(parts)


def _section(numbers: dict[str, Any], file: str) -> Iterator[str]:
    rows, versions = numbers["pairs"], numbers["versions"]
    verdicts = [_verdict(row) for row in rows]
    yield f"## megatron-core {versions['megatron-core']}\n"
    yield f"`{numbers['command']}` at commit `{numbers['commit']}`, {numbers['date']}, {numbers['machine']},"
    yield f"Python {numbers['python']}, torch {versions['torch']}, transformers {versions['transformers']};"
    yield f"{numbers['minutes']} minutes. Raw numbers: [{file}]({file}).\n"
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
    largest = ", ".join(
        f"{name.replace('_', ' ')} {max(row.get(name, 0.0) for row in rows):.1e}" for name in BOUNDS
    )
    if (planned := numbers.get("num_planned", len(rows))) != len(rows):
        yield f"Interrupted: {len(rows)} of {planned} pairs.\n"
    yield f"{len(rows)} pairs: {counts}. Largest of all: {largest}.\n"
    yield "| layout | family | loss | gradient norm | gradient | weights | |"
    yield "|---|---|---|---|---|---|---|"
    for row in numbers["floors"]:
        yield _line({**row, "name": f"floor: one row {row['toy']}"}, "floor")
    for row, verdict in zip(rows, verdicts, strict=True):
        yield _line(row, verdict)
    yield ""


def _line(row: dict[str, Any], verdict: str) -> str:
    layout = row["name"].removesuffix(f" {row['toy']}").replace("|", "\\|")
    if "said" in row:
        return f"| `{layout}` | {row['toy']} | | | | | {verdict}: {row['said'][:200]} |"
    cells = " | ".join(f"{row[name]:.1e}" for name in BOUNDS)
    return f"| `{layout}` | {row['toy']} | {cells} | {verdict} |"


if __name__ == "__main__":
    main()
