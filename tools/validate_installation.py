"""Say what this machine can run: packages, GPU, and on request the collectives of a layout.

    python tools/validate_installation.py
    python tools/validate_installation.py --require deepep,fp8          # ends with 1 where one is missing
    python tools/validate_installation.py --spec "megatron:(attn:d2t2|ffn:e4)" --nproc 4
    python tools/validate_installation.py --json

Each row says why a package cannot be used, or what calls it. Ends with 1 only where something that was
asked for (``--require``, ``--spec``) is missing or wrong. Megatron and vLLM are looked up; ``--import-all``
imports them too.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout it lies in, not from its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from mtrl.parallel.capabilities import PackageReport, Survey, survey
from mtrl.parallel.errors import LayoutError, MtrlError
from mtrl.parallel.layout import check_world_size
from mtrl.parallel.spec import parse_training_spec

GROUPS_TIMEOUT_S = 300.0


def main(arguments: list[str] | None = None) -> int:
    """Print; returns the exit status."""
    options = _parser().parse_args(arguments)
    wanted = [name.strip() for name in options.require.split(",") if name.strip()]
    try:
        found = survey(import_all=options.import_all)
        missing = {name: why for name in wanted if (why := found.obstacle(name))}
        groups = check_groups(options.spec, options.nproc) if options.spec else []
    except (MtrlError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_json(found, groups, missing), indent=2))
    else:
        _show(found, groups, missing)
    return 1 if missing or not all(group["right"] for group in groups) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Say what this machine can run, and why not what it cannot.")
    parser.add_argument(
        "--require", default="", metavar="A,B", help="features or packages that must be usable"
    )
    parser.add_argument("--spec", help="a training string: run a collective on each of its groups")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start; default: the spec's ranks"
    )
    parser.add_argument("--import-all", action="store_true", help="import Megatron and vLLM too (seconds)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    return parser


def check_groups(text: str, num_processes: int | None) -> list[dict[str, Any]]:
    """Run tools/group_check.py on as many processes as the spec has ranks; one entry a group.

    Raises:
        SpecError, LayoutError: the string is wrong, does not fit ``num_processes``, or a rank failed.
    """
    spec = parse_training_spec(text)
    if num_processes is not None:
        check_world_size(spec, num_processes)
    checker = Path(__file__).resolve().with_name("group_check.py")
    with tempfile.TemporaryDirectory(prefix="mtrl-groups-") as folder:
        report = Path(folder, "report.json")
        torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        flags = ["--nproc-per-node", str(spec.world_size), str(checker), str(spec), str(report)]
        try:
            done = subprocess.run(
                torchrun + flags, capture_output=True, text=True, timeout=GROUPS_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LayoutError(f"{spec}: the collectives did not end within {GROUPS_TIMEOUT_S:g} s") from error
        if not report.exists():
            raise LayoutError(f"{spec}: the processes ended with {done.returncode}:\n{done.stderr[-3000:]}")
        groups: list[dict[str, Any]] = json.loads(report.read_text())
        return groups


def as_json(found: Survey, groups: list[dict[str, Any]], missing: dict[str, str]) -> dict[str, Any]:
    """Everything that the tables show, and the import sites."""
    return {
        "machine": dataclasses.asdict(found.machine),
        "packages": [dataclasses.asdict(package) for package in found.packages],
        "features": found.features,
        "groups": groups,
        "ready": found.ready,
        "missing": missing,
    }


def _show(found: Survey, groups: list[dict[str, Any]], missing: dict[str, str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    machine = found.machine
    cuda = ".".join(map(str, machine.cuda)) if machine.cuda else "none"
    gpu = f"{machine.gpu}, sm_{machine.sm[0]}{machine.sm[1]}" if machine.sm else "no GPU"
    console.print(f"{gpu}; torch's CUDA: {cuda}")
    console.print(packages_table(found))
    features = Table("feature", "what stands in the way")
    for name, obstacle in found.features.items():
        features.add_row(name, obstacle or "nothing")
    console.print(features)
    if groups:
        console.print(_groups_table(groups))
    for name, why in missing.items():
        console.print(f"missing: {name}: {why}")
    console.print(f"ready for: {', '.join(found.ready) or 'nothing'}")


def packages_table(found: Survey) -> Table:
    """A row a package: what is found, why it cannot be used, what calls it. Sites are in the JSON."""
    table = Table("package", "found", "state", "called by", "for")
    for report in found.packages:
        called = ", ".join(report.called_by) or _uncalled(report)
        table.add_row(
            report.name, report.version or "-", _state(report), called, ", ".join(report.features) or "-"
        )
    return table


def _state(report: PackageReport) -> str:
    if report.reason:
        return report.reason
    if report.loads is None:
        return "found; not imported"
    return f"loads; kernel: {report.kernel}"


def _uncalled(report: PackageReport) -> str:
    needs = dict.fromkeys(site.when for site in report.sites)
    return f"no run of mtrl; {'; '.join(needs) or 'these versions import it nowhere'}"


def _groups_table(groups: list[dict[str, Any]]) -> Table:
    table = Table("group", "ranks of the first", "collective", "right", "bytes", "GB/s, slowest rank")
    for group in groups:
        ranks = ",".join(map(str, group["ranks"]))
        speed = f"{group['bytes_per_s'] / 1e9:.3f}" if group["bytes_per_s"] else "-"
        right = "yes" if group["right"] else "NO"
        table.add_row(group["group"], ranks, group["collective"], right, str(group["num_bytes"]), speed)
    return table


if __name__ == "__main__":
    sys.exit(main())
