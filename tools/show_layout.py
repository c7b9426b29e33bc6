"""Show what an allocation string means: which ranks form which group, on which nodes, with what of a model.

    python tools/show_layout.py "megatron:(attn:d4p2t2c2|ffn:d2p2t4e2)" --svg layout.svg
    python tools/show_layout.py vllm:d2t4 --model /models/Qwen3-30B-A3B
    python tools/show_layout.py "megatron:(attn:d8|ffn:e8)" vllm:d2t4 --model /models/Qwen3-30B-A3B
    python tools/show_layout.py "megatron:(attn:d8|ffn:e8)" vllm:d2t4 --model FOLDER --rollout-dtype fp8

With a trainer's and a rollout's string it also says what a push of new weights moves, and which rollout
layouts would need the fewest bytes: in bfloat16, or in the FP8 of rollout.dtype: fp8 with its scales. Layouts
that are refused, as for FP8's blocks, are not compared. Of the model's folder only ``config.json`` is read.
Needs no GPU, no torch and no installation. Ends with 1 where a spec does not fit the model, or
cannot have the dtype.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

if not __package__:  # run as a file: import from the checkout it lies in, not from its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from mtrl.models.config import read_hf_config
from mtrl.parallel.errors import LayoutError, MtrlError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import ParallelSpec
from mtrl.tools.layout_facts import MEANINGS, Axis, Share, View, model_shares, ranks_text, refuse_problems
from mtrl.tools.layout_picture import picture_of
from mtrl.tools.layout_svg import draw
from mtrl.tools.push_score import PushScore, RolloutDtype

MAX_GROUPS_SHOWN = 16
MAX_RANKS_LISTED = 64
MAX_RANKS_DRAWN = 4096


def main(arguments: list[str] | None = None) -> int:
    """Print and draw; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        push = _push_score(options) if options.rollout is not None else None
        _show(options.spec, options.model, options.gpus_per_node, options.svg)
        for table in push.tables() if push is not None else ():
            _console().print(table)
    except (MtrlError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Show which ranks form which group, and on which nodes.")
    parser.add_argument("spec", help='allocation string, such as "megatron:(attn:d2t2|ffn:e4)" or vllm:d2t2')
    parser.add_argument(
        "rollout",
        nargs="?",
        help="the engines' string: says what a push to them moves, in --rollout-dtype",
    )
    parser.add_argument("--expert-parallel", action="store_true", help="as rollout.expert_parallel: true")
    parser.add_argument(
        "--rollout-dtype",
        choices=get_args(RolloutDtype),
        default="bf16",
        help="what engines keep weights in, as rollout.dtype; default bf16",
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; shows each rank's share of it")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the layout to this file")
    return parser


def _push_score(options: argparse.Namespace) -> PushScore:
    if options.model is None:
        raise LayoutError("a push is of some model: give --model, a folder with its config.json")
    if options.gpus_per_node < 1:
        raise LayoutError(f"--gpus-per-node {options.gpus_per_node}: a node has at least one GPU")
    return PushScore.of(
        options.spec,
        options.rollout,
        options.model,
        options.gpus_per_node,
        expert_parallel=options.expert_parallel,
        dtype=options.rollout_dtype,
    )


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _show(text: str, model: Path | None, gpus_per_node: int, svg: Path | None) -> None:
    view = View.of(text, gpus_per_node)
    shares = model_shares(view.spec, read_hf_config(model)) if model is not None else []
    console = _console()
    canonical = f", the same as {view.spec}" if str(view.spec) != view.text else ""
    console.print(view.text + canonical, style="bold", markup=False)
    console.print(view.summary)
    console.print(view.crossings)
    console.print(_axis_table(view))
    if isinstance(view.spec, ParallelSpec) and view.spec.world_size <= MAX_RANKS_LISTED:
        console.print(_rank_table(RankLayout.from_spec(view.spec), gpus_per_node))
    if shares:
        console.print(_share_table(shares))
    if svg is not None:
        _write_svg(view, shares, svg)
        console.print(f"drawn to {svg}")
    refuse_problems(view.spec, shares)


def _axis_table(view: View) -> Table:
    table = Table(title="groups of each axis", title_justify="left")
    for heading in ("axis", "size", "groups", "nodes", "ranks of each group", "what it does"):
        table.add_column(heading, justify="right" if heading in ("size", "groups", "nodes") else "left")
    for axis in view.axes:
        num_nodes = str(axis.num_nodes(view.gpus_per_node))
        row = (
            axis.name,
            str(axis.size),
            str(len(axis.groups)),
            num_nodes,
            _groups_text(axis),
            MEANINGS[axis.name],
        )
        table.add_row(*row, style="dim" if axis.size == 1 else "")
    return table


def _groups_text(axis: Axis) -> str:
    if axis.size == 1 or axis.name == "ffn.pp":
        return "each rank alone" if axis.size == 1 else "as attn.pp"
    shown = axis.groups if len(axis.groups) <= MAX_GROUPS_SHOWN else axis.groups[: MAX_GROUPS_SHOWN // 2]
    rest = len(axis.groups) - len(shown)
    return "  ".join(map(ranks_text, shown)) + (f"  and {rest} more" if rest else "")


def _rank_table(layout: RankLayout, gpus_per_node: int) -> Table:
    table = Table(title="place of each rank, from 0", title_justify="left")
    for heading in ("rank", "node", "gpu", "pp", "dp", "cp", "tp", "edp", "ep", "etp"):
        table.add_column(heading, justify="right")
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        attn, ffn = (place.dp, place.cp, place.tp), (place.edp, place.ep, place.etp)
        numbers = (rank, *divmod(rank, gpus_per_node), place.pp, *attn, *ffn)
        table.add_row(*map(str, numbers), end_section=(rank + 1) % gpus_per_node == 0)
    return table


def _share_table(shares: list[Share]) -> Table:
    table = Table(title="the model", title_justify="left")
    for heading in ("what", "in all", "a rank"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for share in shares:
        table.add_row(share.what, str(share.total), share.per_rank, style="bold red" if share.problem else "")
    return table


def _write_svg(view: View, shares: list[Share], svg: Path) -> None:
    if view.spec.world_size > MAX_RANKS_DRAWN:
        raise LayoutError(f"{view.spec.world_size} ranks are too many to draw; at most {MAX_RANKS_DRAWN}")
    num_layers = next((share.total for share in shares if share.what == "layers"), None)
    svg.write_text(draw(picture_of(view, num_layers)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
