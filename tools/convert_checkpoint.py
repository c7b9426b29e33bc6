"""Convert weights between Hugging Face folders, mtrl checkpoints and Megatron's ``torch_dist``, with proof.

    python tools/convert_checkpoint.py /models/Qwen3-30B-A3B megatron_qwen3 --to torch_dist
    python tools/convert_checkpoint.py megatron_qwen3 qwen3_again --to hf --config /models/Qwen3-30B-A3B
    python tools/convert_checkpoint.py runs/my_run/checkpoints/step_000200 out --to hf --dtype bfloat16
    python tools/convert_checkpoint.py /models/DeepSeek-V3 deepseek_bf16 --to hf --verify full --dry-run

What is given is recognised by its files; sizes come from its config.json. An interrupted conversion goes on
when the same command is given again, with the files that were written whole. The target gets its name only
when the proof holds; the exit status is 0 only then.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the checkout it lies in, not from its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mtrl.checkpoint.convert import convert, finish, hold
from mtrl.checkpoint.convert_plan import Plan, Request, make_plan
from mtrl.checkpoint.prove import Level, prove
from mtrl.parallel import quiet
from mtrl.parallel.errors import MtrlError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Plan, convert, prove; returns the exit status."""
    options = _parser().parse_args(arguments)
    request = Request(
        source=options.source,
        target=options.target,
        to=options.to,
        config=options.config,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        shard_bytes=max(1, int(options.shard_gb * 2**30)),
        with_optimizer=options.with_optimizer,
        trust_remote_code=options.trust_remote_code,
    )
    quiet.install()
    try:
        plan = make_plan(request)
        print(describe(plan), flush=True)
        if options.dry_run:
            print("nothing was written (--dry-run)")
            return 0
        with hold(plan):
            run(plan, options.verify)
    except MtrlError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except (OSError, KeyboardInterrupt) as error:
        what = "stopped" if isinstance(error, KeyboardInterrupt) else f"OSError: {error}"
        print(f"{what}; the same command goes on from {request.partial}", file=sys.stderr)
    else:
        print(f"written: {request.target}")
        return 0
    return 1


def run(plan: Plan, level: Level) -> None:
    """Convert, prove, and give the target its name."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("converting", total=plan.num_bytes)
        convert(plan, lambda count: bars.advance(task, count))
        proving = bars.add_task("comparing", total=plan.num_bytes, visible=level != "names")
        for line in prove(plan, level=level, report=lambda count: bars.advance(proving, count)):
            print(f"proved: {line}", flush=True)
    finish(plan)


def describe(plan: Plan) -> str:
    """What is going to be done, for people."""
    request = plan.request
    lines = [
        f"{plan.source_format} {request.source} -> {request.to} {request.target}: {plan.config.family}, "
        f"{len(plan.kinds)} tensors, {plan.num_bytes / 1e9:.2f} GB"
    ]
    if request.to != "torch_dist":
        files = list(plan.shards)
        more = f" to {files[-1]}" if len(files) > 1 else ""
        lines.append(f"files: {files[0]}{more}; copied: {', '.join(plan.copies) or 'none'}")
    counts: dict[str, int] = {}
    for dtype, _ in plan.kinds.values():
        counts[str(dtype).removeprefix("torch.")] = counts.get(str(dtype).removeprefix("torch."), 0) + 1
    lines.append("dtypes: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder to read")
    parser.add_argument("target", type=Path, help="folder to write; must not hold anything")
    parser.add_argument("--to", required=True, choices=["hf", "mtrl", "torch_dist"], help="its format")
    parser.add_argument("--config", type=Path, metavar="DIR", help="folder with config.json and tokenizer")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="cast floats; default: as they are")
    parser.add_argument("--shard-gb", type=float, default=4.0, metavar="GB", help="largest file, default 4")
    parser.add_argument(
        "--with-optimizer", action="store_true", help="mtrl to mtrl: take training state along"
    )
    parser.add_argument(
        "--verify",
        choices=["names", "full", "logits"],
        default="names",
        help="names, shapes, dtypes and bytes; full: every bit too; logits: the model's output besides",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="copy auto_map and its code")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
