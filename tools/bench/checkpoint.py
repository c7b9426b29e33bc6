"""Saving and loading a checkpoint of a gigabyte, beside ``cp`` and ``sha256sum`` of the same bytes.

``python tools/bench/checkpoint.py`` lets two processes save and load weights and Adam's moments of a
Qwen3-MoE, in turns with ``cp -r`` of the checkpoint followed by ``sha256sum`` of the copy, in one process
each as a user would run them; and writes ``docs/benchmarks/checkpoint.json`` and
``docs/checkpoint_speed.md``. Extra memory is what the processes together held at most, beyond what they held
before, of pages that are no file's.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, "") and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from mtrl.checkpoint.format import RunState  # noqa: E402
from mtrl.checkpoint.load import newest_whole, restore_optimizer  # noqa: E402
from mtrl.checkpoint.optimizer_state import OptimizerState  # noqa: E402
from mtrl.checkpoint.save import Checkpointer, Contents  # noqa: E402
from mtrl.config_engines import OptimizerSection  # noqa: E402
from mtrl.models.builder import build_model  # noqa: E402
from mtrl.models.families import load_model_config  # noqa: E402
from mtrl.models.hf import initialize, load_hf  # noqa: E402
from mtrl.parallel import groups as parallel_groups  # noqa: E402
from mtrl.parallel.agreement import gather_json  # noqa: E402
from mtrl.parallel.layout import RankLayout  # noqa: E402
from mtrl.parallel.spec import parse_training_spec  # noqa: E402
from mtrl.tools.bench.about import commit  # noqa: E402
from mtrl.trainer import Trainer  # noqa: E402

NUMBERS, PAGE = ROOT / "docs/benchmarks/checkpoint.json", ROOT / "docs/checkpoint_speed.md"
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors")
SPEC = "megatron:(attn:d2|ffn:e2)"
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 512,
    "initializer_range": 0.02, "intermediate_size": 1536, "max_position_embeddings": 4096,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 8, "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 4,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 16384,
}  # fmt: skip


def main() -> None:
    """Measure, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure(options.rank, options.rounds)
        return
    if not options.render:
        with tempfile.TemporaryDirectory() as name:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
            own = ["--rank", name, "--rounds", str(options.rounds)]
            subprocess.run([sys.executable, *launch, *own], check=True)
            numbers = json.loads((Path(name) / "numbers.json").read_text())
        numbers["about"]["command"] = f"python tools/bench/checkpoint.py --rounds {options.rounds}"
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))


@dataclass(slots=True)
class Run:
    """What a rank works with."""

    folder: Path
    trainer: Trainer

    def contents(self, step: int) -> Contents:
        """A checkpoint of everything there is."""
        own = OptimizerState.of(self.trainer.model, self.trainer.optimizer)
        state = RunState(
            step=step, phase="main", phase_step=step, num_records=1, seed=1, epoch=0, index=0,
            optimizer_steps=own.num_steps, scheduler_steps=0, num_optimizer_tensors=own.count_tensors(),
            policy_version=0, spec=SPEC, world_size=2, precision="fp32", metrics_bytes=0, evaluations_bytes=0,
            summary={}, versions={},
        )  # fmt: skip
        return Contents(
            model=self.trainer.model,
            optimizer=self.trainer.optimizer,
            state=state,
            config={},
            tokenizer=self.folder,
        )

    def save(self, step: int) -> None:
        """Write it, and wait until it is on disk."""
        Checkpointer(self.folder / "checkpoints", keep_last=1, keep_every=None).save(self.contents(step))

    def load(self) -> None:
        """Verify the newest checkpoint and put weights and moments back."""
        checkpoint, _ = newest_whole(self.folder / "checkpoints", may_go_back=False)
        load_hf(self.trainer.model, checkpoint)
        state = RunState.read(checkpoint)
        restore_optimizer(self.trainer.model, self.trainer.optimizer, checkpoint, state)


def measure(folder: Path, num_rounds: int) -> None:
    """On a rank: all rounds; rank 0 leaves the numbers in ``folder``. Collective over WORLD."""
    torch.set_num_threads(1)
    parallel_groups.init_distributed()
    parallel = parallel_groups.create(RankLayout.from_spec(parse_training_spec(SPEC)))
    parallel_groups.seed_everything(1, parallel)
    if dist.get_rank() == 0:
        (folder / "config.json").write_text(json.dumps(MODEL))
    dist.barrier()
    model = build_model(load_model_config(folder), parallel)
    initialize(model, 1)
    trainer = Trainer(model, OptimizerSection(lr=1e-3))
    trainer.start_phase(total_steps=1, lr=1e-3, warmup_steps=0)
    for shard in OptimizerState.of(model, trainer.optimizer).shards:
        for tensor in shard.tensors().values():
            tensor.normal_()
    run, rounds = Run(folder, trainer), []
    run.save(1)
    size = sum(path.stat().st_size for path in folder.rglob("step_*/**/*") if path.is_file())
    for number in range(2, num_rounds + 2):
        row: dict[str, Any] = {}
        row["save_s"], row["save_bytes"] = timed(partial(run.save, number))
        row["load_s"], row["load_bytes"] = timed(run.load)
        row["cp_s"], _ = timed(partial(on_first, partial(copy, folder, number)))
        rounds.append(row)
    if dist.get_rank() == 0:
        about = {
            "commit": commit(), "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "load_average": os.getloadavg()[0],
        }  # fmt: skip
        (folder / "numbers.json").write_text(json.dumps({"about": about, "bytes": size, "rounds": rounds}))
    dist.barrier()
    dist.destroy_process_group()


def on_first(action: Callable[[], object]) -> None:
    """On rank 0 alone."""
    if dist.get_rank() == 0:
        action()


def copy(folder: Path, step: int) -> None:
    """What is compared with: copy the checkpoint, then compute the copy's checksums."""
    source, target = folder / "checkpoints" / f"step_{step:06d}", folder / "copy"
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    files = [str(path) for path in target.rglob("*") if path.is_file()]
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    threading.Thread(target=shutil.rmtree, args=(target,)).start()


def timed(action: Callable[[], None]) -> tuple[float, int]:
    """Seconds until all ranks are done, and the most memory that all together held besides what they had."""
    on_first(partial(subprocess.run, ["sync"], check=True))
    time.sleep(0.5)
    dist.barrier()
    stop, samples, before = threading.Event(), [0], anonymous_bytes()

    def watch() -> None:
        while not stop.wait(0.005):
            samples.append(anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    action()
    dist.barrier()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return seconds, sum(gather_json(max(samples)))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; this measurement needs Linux")


def page(numbers: dict[str, Any]) -> str:
    """The page, from the raw numbers."""
    about, rounds, size = numbers["about"], numbers["rounds"], numbers["bytes"]
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        "# A checkpoint beside cp and sha256sum\n",
        f"{size / 1e9:.2f} GB of weights and Adam's moments, float32, of a Qwen3-MoE under `{SPEC}`: two "
        "processes",
        "save (bytes and names forced to disk) and load (every checksum verified); `cp -r` and `sha256sum` "
        "of the",
        "same files take turns with them. Ratios are within a round: least, median, greatest. *Extra "
        "memory* is",
        "the most of both processes together, beyond what they held, in share of the checkpoint.\n",
        f"`{about['command']}` at commit `{about['commit']}`, {about['date']}, {about['machine']}, "
        f"{versions};",
        f"load average at the end {about['load_average']:.1f}. Raw: "
        "[checkpoint.json](benchmarks/checkpoint.json).\n",
        "| | seconds | over cp + sha256sum | extra memory |",
        "|---|---:|---:|---:|",
        f"| cp, sha256sum | {median(row['cp_s'] for row in rounds):.2f} | | |",
    ]
    for what in ("save", "load"):
        ratios = sorted(row[f"{what}_s"] / row["cp_s"] for row in rounds)
        share = max(row[f"{what}_bytes"] for row in rounds) / size
        lines.append(
            f"| {what} | {median(row[f'{what}_s'] for row in rounds):.2f} "
            f"| {ratios[0]:.2f} {median(ratios):.2f} {ratios[-1]:.2f} | {share:.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
