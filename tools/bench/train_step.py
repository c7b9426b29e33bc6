"""One training step in one process: mtrl's trainer beside transformers' model with torch.optim.

``python tools/bench/train_step.py`` trains the same Qwen3-MoE (4 layers, 128 wide, 8 experts, fp32) from the
same weights on the same batches on both sides, taking turns step by step, and writes
``docs/benchmarks/train_step.json`` and ``docs/train_step.md``. A step is forward, backward, clipping and
Adam. mtrl packs samples, transformers pads them to the longest.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtrl.batch import Sample
from mtrl.config_engines import OptimizerSection
from mtrl.models.builder import build_model
from mtrl.models.families import load_model_config
from mtrl.models.hf import load_hf
from mtrl.objectives import SftLoss
from mtrl.parallel import groups as parallel_groups
from mtrl.parallel.groups import ParallelGroups
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from mtrl.policy import make_microbatches
from mtrl.tools.bench.about import about
from mtrl.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE = ROOT / "docs/benchmarks/train_step.json", ROOT / "docs/train_step.md"
PACKAGES = ("torch", "megatron-core", "transformers")
LR, CLIP, BETAS, EPS = 1e-3, 1.0, (0.9, 0.95), 1e-8
NUM_SAMPLES, VOCAB_SIZE = 64, 256
BATCHES = {
    "64 samples of 128 tokens": [128] * NUM_SAMPLES,
    "64 samples of 16 to 256 tokens": [16 + 240 * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)],
}
Step = Callable[[Sequence[Sample]], float]


def main() -> None:
    """Measure, then write numbers and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="counted steps, after two that are not")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch's; a run for each")
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if not options.render:
        NUMBERS.write_text(json.dumps(measure(options.steps, options.threads), indent=1) + "\n")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))


def measure(num_steps: int, threads: Sequence[int]) -> dict[str, Any]:
    """Seconds of every step of both sides, by batch and number of threads."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    parallel_groups.init_distributed(timeout_s=60)
    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec("megatron:d1")))
    parallel_groups.seed_everything(1, groups)
    runs = []
    for name, lengths in BATCHES.items():
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            with tempfile.TemporaryDirectory() as folder:
                sides = open_sides(Path(folder), groups)
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            losses: dict[str, list[float]] = {side: [] for side in sides}
            for step in range(num_steps + 2):
                batch = make_batch(lengths, seed=step)
                for side, train in sides.items():
                    start = time.perf_counter()
                    losses[side].append(train(batch))
                    seconds[side].append(time.perf_counter() - start)
            runs.append({"batch": name, "threads": num_threads, "seconds": seconds, "losses": losses})
    return {
        **about(f"python tools/bench/train_step.py --steps {num_steps}", PACKAGES),
        "runs": runs,
    }


def make_batch(lengths: Sequence[int], *, seed: int) -> list[Sample]:
    """Random samples, every token but the first trained."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(
            sample_id=number,
            tokens=tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()),
            loss_mask=(False, *[True] * (length - 1)),
        )
        for number, length in enumerate(lengths)
    ]


def open_sides(folder: Path, groups: ParallelGroups) -> dict[str, Step]:
    """Both sides' step, from the same weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=256, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=128, norm_topk_prob=True, max_position_embeddings=512, initializer_range=0.02,
    )  # fmt: skip
    reference = transformers.Qwen3MoeForCausalLM(config).float().train()
    reference.save_pretrained(folder)
    return {"transformers": _transformers_step(reference), "mtrl": _mtrl_step(folder, groups)}


def _mtrl_step(folder: Path, groups: ParallelGroups) -> Step:
    model = build_model(load_model_config(folder), groups)
    load_hf(model, folder)
    settings = OptimizerSection(lr=LR, grad_clip=CLIP, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
    trainer = Trainer(model, settings)
    trainer.start_phase(total_steps=1000, lr=LR, warmup_steps=0)

    def step(batch: Sequence[Sample]) -> float:
        microbatches = make_microbatches(batch, model, max_tokens=8192, pad_token_id=0)
        return trainer.step(microbatches, SftLoss()).loss

    return step


def _transformers_step(model: Any) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)

    def step(batch: Sequence[Sample]) -> float:
        longest = max(len(sample.tokens) for sample in batch)
        num_trained = sum(sample.num_loss_tokens for sample in batch)
        total = 0.0
        optimizer.zero_grad()
        per_microbatch = max(1, 8192 // longest)
        for start in range(0, len(batch), per_microbatch):
            part = batch[start : start + per_microbatch]
            tokens = torch.zeros(len(part), longest, dtype=torch.int64)
            mask = torch.zeros(len(part), longest, dtype=torch.int64)
            for row, sample in enumerate(part):
                tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
                mask[row, : len(sample.tokens)] = 1
            logits = model(tokens, attention_mask=None if bool(mask.all()) else mask).logits[:, :-1]
            targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = loss / num_trained
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    return step


def page(numbers: dict[str, Any]) -> str:
    """The page, from the content of ``train_step.json``."""
    versions = ", ".join(f"{name} {found}" for name, found in numbers["versions"].items())
    lines = [
        "# A training step in one process",
        "",
        "Forward, backward, clipping and Adam of the same Qwen3-MoE (4 layers, 128 wide, 8 experts, fp32)",
        "from the same weights on the same batches, by mtrl and by transformers' model with torch.optim,",
        "taking turns step by step. Medians in seconds; the ratio is transformers' over mtrl's. The last",
        "column is the largest relative difference of their losses over all steps.",
        "",
        f"`{numbers['command']}` at commit `{numbers['commit']}`, {numbers['date']}, {numbers['machine']};",
        f"{versions}. Raw numbers: [train_step.json](benchmarks/train_step.json).",
        "",
        "| batch | threads | transformers | mtrl | ratio | losses differ by |",
        "|---|---|---|---|---|---|",
    ]
    for run in numbers["runs"]:
        theirs, ours = (median(run["seconds"][side][2:]) for side in ("transformers", "mtrl"))
        pairs = zip(run["losses"]["transformers"], run["losses"]["mtrl"], strict=True)
        differ = max(abs(a - b) / abs(a) for a, b in pairs)
        cells = f"{theirs:.3f} | {ours:.3f} | {theirs / ours:.2f} | {differ:.0e}"
        lines.append(f"| {run['batch']} | {run['threads']} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
