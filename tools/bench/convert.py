"""Conversions of a Hugging Face folder of five gigabytes beside ``cp -r`` of it: seconds and peak memory.

``python tools/bench/convert.py`` makes a folder with the sizes of Qwen3-30B-A3B's layers (three of them, of
128 experts) and random bf16 weights, and times ``cp -r`` and ``tools/convert_checkpoint.py`` on it by turns,
each in a process of its own, the folder in the page cache and nothing left to be written. It writes
``docs/convert.json`` and, from that, ``docs/convert.md``. It needs 16 GB in the temporary folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtrl.checkpoint.convert_plan import num_bytes
from mtrl.models.files import SafetensorsWriter
from mtrl.models.hf_folder import INDEX_NAME
from mtrl.tools.bench.about import about

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE = ROOT / "docs/convert.json", ROOT / "docs/convert.md"
TOOL = ROOT / "tools/convert_checkpoint.py"
PACKAGES = ("torch", "safetensors")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu",
    "attention_bias": False, "dtype": "bfloat16",
}  # fmt: skip
SHARD_BYTES = 10**9
ASKED_RATIO, ASKED_MIB = 2.5, 1024
STEPS: dict[str, tuple[str, ...]] = {
    "cp -r": ("cp", "-r", "{source}", "{copy}"),
    "hf to hf": ("{source}", "{hf}", "--to", "hf"),
    "hf to hf, --verify full": ("{source}", "{hf}", "--to", "hf", "--verify", "full"),
    "hf to torch_dist": ("{source}", "{torch_dist}", "--to", "torch_dist"),
    "torch_dist to hf": ("{torch_dist}", "{hf}", "--to", "hf", "--config", "{source}"),
}
# A process inherits the peak of the one that started it: a small one starts it.
STARTER = """
import os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(time.perf_counter() - start, used.ru_maxrss / 1024, used.ru_utime, used.ru_stime)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def main() -> None:
    """Measure, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="each measures everything once")
    parser.add_argument("--layers", type=int, default=3, help="of the folder; one more is 1.2 GB")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if not options.render:
        NUMBERS.write_text(json.dumps(measure(options.rounds, options.layers), indent=1) + "\n")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))


def measure(num_rounds: int, num_layers: int) -> dict[str, Any]:
    """Seconds and memory of every step of every round."""
    numbers: dict[str, Any] = {
        **about(f"python tools/bench/convert.py --rounds {num_rounds} --layers {num_layers}", PACKAGES),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in ("source", "copy", "hf", "torch_dist")}
        numbers |= make_folder(folders["source"], num_layers)
        for number in range(num_rounds):
            for step, command in STEPS.items():
                run = {"round": number, "step": step} | run_step(step, command, folders)
                print(json.dumps(run), file=sys.stderr)
                numbers["runs"].append(run)
            shutil.rmtree(folders["torch_dist"])
    return numbers


def make_folder(folder: Path, num_layers: int) -> dict[str, Any]:
    """Write a folder whose tensors are stretches of one random block; its sizes in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    block = torch.randn(2**24, generator=torch.Generator().manual_seed(1)).bfloat16()
    files: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = {}
    for name, shape in tensor_shapes(num_layers).items():
        sizes[name] = num_bytes((torch.bfloat16, shape))
        if files[-1] and sum(sizes[held] for held in files[-1]) + sizes[name] > SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    where: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys(shapes, file)
        kinds = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        with SafetensorsWriter(folder / file, kinds) as writer:
            for offset, name in enumerate(shapes):
                left = sizes[name] // 2
                parts = [block[offset:]] * (left // len(block[offset:]))
                parts.append(block[offset : offset + left - sum(map(len, parts))])
                writer.write_parts(name, parts)
            writer.close()
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    total = sum(path.stat().st_size for path in folder.iterdir())
    return {"num_bytes": total, "largest_tensor_bytes": max(sizes.values()), "num_tensors": len(sizes)}


def tensor_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as Qwen3-MoE is published."""
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["vocab_size"]
    head = CONFIG["head_dim"]
    heads, groups = head * CONFIG["num_attention_heads"], head * CONFIG["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes: dict[str, tuple[int, ...]] = {**found, "model.norm.weight": (hidden,)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}."
        shapes |= {at + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {at + f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        rows = {"q": heads, "k": groups, "v": groups}
        shapes |= {at + f"self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()}
        shapes[at + "self_attn.o_proj.weight"] = (hidden, heads)
        shapes[at + "mlp.gate.weight"] = (CONFIG["num_experts"], hidden)
        for expert in range(CONFIG["num_experts"]):
            own = f"{at}mlp.experts.{expert}."
            shapes |= {own + f"{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            shapes[own + "down_proj.weight"] = (hidden, inner)
    return shapes


def run_step(step: str, command: Sequence[str], folders: Mapping[str, Path]) -> dict[str, Any]:
    """Run one command in a process of its own, from warm caches; what it took."""
    for name in ("copy", "hf"):
        shutil.rmtree(folders[name], ignore_errors=True)
    for path in folders["source"].iterdir():
        with path.open("rb") as file:
            while file.read(2**23):
                continue
    os.sync()
    load = os.getloadavg()[0]
    arguments = [each.format(**folders) for each in command]
    arguments = arguments if command[0] == "cp" else [sys.executable, str(TOOL), *arguments]
    done = subprocess.run([sys.executable, "-c", STARTER, *arguments], stdout=subprocess.PIPE, check=True)
    wall_s, peak_mib, user_s, system_s = map(float, done.stdout.split())
    start = time.perf_counter()
    os.sync()
    taken = {"wall_s": wall_s, "user_s": user_s, "system_s": system_s, "sync_s": time.perf_counter() - start}
    return {"load": load, "peak_mib": peak_mib} | {key: round(value, 3) for key, value in taken.items()}


def page(numbers: Mapping[str, Any]) -> str:
    """The page, from the content of ``convert.json``."""
    versions = ", ".join(f"{name} {found}" for name, found in numbers["versions"].items())
    loads = [run["load"] for run in numbers["runs"]]
    largest = numbers["largest_tensor_bytes"] / 2**20
    lines = [
        "# Converting a folder, beside `cp` of it",
        "",
        f"A Hugging Face folder of {numbers['num_bytes'] / 1e9:.2f} GB: {numbers['num_tensors']} tensors in",
        "bf16, with the sizes of Qwen3-30B-A3B (128 experts a layer) and fewer layers. By turns, each in a",
        "process of its own with the folder in the page cache: `cp -r` of it, which does not wait for the",
        "disk, and `tools/convert_checkpoint.py`, which does, start of Python and proof included. Medians;",
        "*ratio* is to `cp -r` of the same round: least, median, greatest. *peak* is the process's largest",
        f"resident set; asked is {ASKED_MIB} MiB and the largest tensor, {largest:.0f} MiB. *sync* is",
        "how long the disk is then still busy.",
        "",
        f"`{numbers['command']}` at commit `{numbers['commit']}`, {numbers['date']}, {numbers['machine']};",
        f"{versions}; load {min(loads):.1f} to {max(loads):.1f} before the steps. Raw numbers:",
        "[convert.json](convert.json).",
        "",
        "| | seconds | sync | ratio | peak |",
        "|---|---:|---:|---:|---:|",
    ]
    copies = _of_step(numbers, "cp -r", "wall_s")
    for step in STEPS:
        walls = _of_step(numbers, step, "wall_s")
        ratios = sorted(wall / copy for wall, copy in zip(walls, copies, strict=True))
        shown = f"{ratios[0]:.2f} {median(ratios):.2f} {ratios[-1]:.2f}" if step != "cp -r" else ""
        sync, peak = median(_of_step(numbers, step, "sync_s")), max(_of_step(numbers, step, "peak_mib"))
        lines.append(f"| {step} | {median(walls):.2f} | {sync:.2f} | {shown} | {peak:.0f} MiB |")
    ratio = median(_of_step(numbers, "hf to hf", "wall_s")) / median(copies)
    lines += ["", f"Of the medians, `hf to hf` takes {ratio:.2f} times `cp -r`; asked is {ASKED_RATIO}.", ""]
    return "\n".join(lines)


def _of_step(numbers: Mapping[str, Any], step: str, key: str) -> list[float]:
    return [run[key] for run in numbers["runs"] if run["step"] == step]


if __name__ == "__main__":
    main()
