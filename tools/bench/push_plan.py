"""How long a push takes to plan for large models on 1,024 ranks, and what the plan moves; on one core.

``python tools/bench/push_plan.py`` plans, for each case in a process of its own, one rank's sends and
receives (``mtrl/weight_push/nodes.py``), scores the layouts (``score.py``), and writes
``docs/push_plan.json`` and ``docs/push_plan.md``. Nothing is sent: needs no GPU, no torch and no vLLM.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, "") and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mtrl.models.families import load_model_config  # noqa: E402
from mtrl.models.stages import Stages  # noqa: E402
from mtrl.parallel.layout import RankLayout  # noqa: E402
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec  # noqa: E402
from mtrl.tools.bench.about import commit  # noqa: E402
from mtrl.tools.push_score import ITEMSIZE, gigabytes  # noqa: E402
from mtrl.weight_push.kinds import Engines, Kind, alike_of, kinds_of  # noqa: E402
from mtrl.weight_push.nodes import NodePlan, Numbers, plan_alike  # noqa: E402
from mtrl.weight_push.score import compare, score  # noqa: E402

NUMBERS, PAGE = ROOT / "docs/push_plan.json", ROOT / "docs/push_plan.md"
CONFIGS = ROOT / "tests/model_configs"
GPUS_PER_NODE = 8
CASES = (
    ("DeepSeek-V3", "megatron:(attn:d16p16t4|ffn:e64)", "vllm:d32t32", True),
    ("DeepSeek-V3", "megatron:(attn:d16p16t4|ffn:e64)", "vllm:d32t32", False),
    ("DeepSeek-V3", "megatron:(attn:d16p16t4|ffn:e64)", "vllm:d64t16", True),
    ("DeepSeek-V3", "megatron:(attn:d256t4|ffn:e256)", "vllm:d8t128", True),
    ("Kimi-K2", "megatron:(attn:d16p16t4|ffn:e32)", "vllm:d32t32", True),
    ("Qwen3-235B-A22B", "megatron:(attn:d64p4t4|ffn:e32)", "vllm:d128t8", True),
    ("Qwen3-30B-A3B", "megatron:(attn:d512t2|ffn:e8)", "vllm:d256t4", False),
)

HEAD = """# Planning a push for 1,024 ranks

What `show_layout.py TRAIN ROLLOUT --model FOLDER` says, and what `plan_alike` plans, for published models in
bfloat16 on {num_nodes} nodes of {gpus_per_node}; every case in a process of its own, on one core. *plan* is one rank's sends and
receives (a rank in the middle of the world), names of all tensors included, with the traffic of all ranks; *score*
is the layout's, *all* that of every rollout layout of as many ranks. *peak* is the process's memory at its highest,
*empty* before any of it. Times are the process's CPU seconds; beside others on the machine, wall seconds are more.

Per rank and per node the plan moves need minus have, exactly: the script ends if its traffic is not the score's.
*card* is by how much the rank that sends, or receives, most across nodes is above the mean. A pipeline stage with
more layers than others, or with the embedding, has more to send; what only one rank of a node needs, that rank has
to receive; the rest is shared out so that loads come out level.

`{command}` at commit `{commit}`, {date}, {machine}; {versions}. Raw: [push_plan.json](push_plan.json).
"""  # noqa: E501


def main() -> None:
    """Measure, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(*CASES[options.case])))
        return
    if not options.render:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        rows = []
        for case in range(len(CASES)):
            command = [sys.executable, __file__, "--case", str(case)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            rows.append(json.loads(done.stdout))
        NUMBERS.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))


def about() -> dict[str, Any]:
    """Where and how it was measured."""
    return {
        "command": "python tools/bench/push_plan.py",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": f"python {platform.python_version()}, numpy {version('numpy')}",
    }


def measure(model: str, train: str, rollout: str, expert_parallel: bool) -> dict[str, Any]:
    """Seconds and bytes of one case, in this process, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    empty = peak_bytes()
    start, wall = time.process_time(), time.perf_counter()
    config = load_model_config(CONFIGS / model)
    layout = RankLayout.from_spec(parse_training_spec(train))
    engines = Engines(spec=parse_rollout_spec(rollout), expert_parallel=expert_parallel)
    stages = Stages.balanced(config.num_layers, layout.spec.attn.pp)

    def kinds_for(each: Engines) -> tuple[Kind, ...]:
        return kinds_of(config, layout, each, stages, ITEMSIZE)

    kinds = kinds_for(engines)
    names = [name for kind in kinds for name in kind.all_names()]
    node_of = [rank // GPUS_PER_NODE for rank in range(layout.world_size)]
    rank = layout.world_size // 2 + 3
    plan, traffic = plan_alike(alike_of(kinds, layout, engines), node_of, names, [rank])
    plan_s, plan_wall_s = time.process_time() - start, time.perf_counter() - wall
    start = time.process_time()
    bound = score(kinds, layout, engines, GPUS_PER_NODE)
    score_s = time.process_time() - start
    start = time.process_time()
    others = compare(kinds_for, layout, engines, GPUS_PER_NODE)
    compare_s = time.process_time() - start
    if (traffic.received != bound.received).any() or (traffic.into_nodes(node_of) != bound.into_nodes).any():
        raise SystemExit(f"{model}, {train} to {engines}: the plan does not move need minus have")
    return {
        "model": model, "train": train, "engines": str(engines), "ranks": layout.world_size,
        "tensors": len(names), "plan_s": plan_s, "plan_wall_s": plan_wall_s, "score_s": score_s,
        "compare_s": compare_s, "compared": len(others), "peak_bytes": peak_bytes(), "empty_bytes": empty,
        "sends": count(plan, rank, "source"), "receives": count(plan, rank, "target"),
        "needed": ends(bound.needed), "received": ends(traffic.received),
        "into_nodes": ends(bound.into_nodes), "local_share": bound.local_share,
        "sent_across": ends(traffic.sent_across), "received_across": ends(traffic.received_across),
        "sent_inside": ends(traffic.sent_inside), "forwarded": len(plan.forwarded.transfers),
    }  # fmt: skip


def count(plan: NodePlan, rank: int, end: str) -> int:
    """Transfers to other ranks that begin or end at ``rank``."""
    both = (*plan.first.transfers, *plan.forwarded.transfers)
    return sum(each.source != each.target and getattr(each, end) == rank for each in both)


def ends(numbers: Numbers) -> dict[str, float]:
    """The most and the mean."""
    return {"most": int(numbers.max()), "mean": float(numbers.mean())}


def peak_bytes() -> int:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def page(numbers: Mapping[str, Any]) -> str:
    """The page, from the raw numbers."""
    rows = numbers["rows"]
    num_nodes = rows[0]["ranks"] // GPUS_PER_NODE
    lines = [
        HEAD.format(num_nodes=num_nodes, gpus_per_node=GPUS_PER_NODE, **numbers["about"]),
        "| model | tensors | trainer | engines | plan | its sends, receives | score | all | peak | empty |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['tensors']} | `{row['train'].replace('|', '&#124;')}` | "
            f"{row['engines']} | {row['plan_s']:.1f} s | {row['sends']}, {row['receives']} | "
            f"{row['score_s']:.2f} s | {row['compare_s']:.1f} s ({row['compared']}) | "
            f"{row['peak_bytes'] / 1e6:.0f} MB | {row['empty_bytes'] / 1e6:.0f} MB |"
        )
    lines += [
        "",
        "| model | engines | an engine rank reads | a rank receives | a node receives | local "
        "| card, sending | card, receiving |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['engines']} | {gigabytes(row['needed']['most'])} "
            f"| {gigabytes(row['received']['most'])} | {gigabytes(row['into_nodes']['most'])} "
            f"| {row['local_share']:.1%} | {over(row['sent_across'])} | {over(row['received_across'])} |"
        )
    return "\n".join(lines) + "\n"


def over(numbers: Mapping[str, float]) -> str:
    """How much the most is above the mean."""
    return f"+{numbers['most'] / numbers['mean'] - 1:.1%}" if numbers["mean"] else "none"


if __name__ == "__main__":
    main()
