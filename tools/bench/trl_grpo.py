"""One process of TRL's side of ``grpo_step``: TRL's GRPOTrainer, timed by a callback.

Runs in an environment of its own that has TRL and not mtrl, so it imports nothing of mtrl. Writes
``OUT.RANK.json`` with the same keys as ``mtrl_grpo``.
"""

import argparse
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def by_hash(completion_ids: list[list[int]], **unused: Any) -> list[float]:
    """The reward of ``mtrl_grpo.by_hash``."""
    return [zlib.crc32(str(list(ids)).encode()) / 2**32 for ids in completion_ids]


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that adds up the seconds of generation."""

    generate_s = 0.0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        self.generate_s += time.perf_counter() - start
        self.num_sampled = [len(ids) for ids in result[0]]
        return result


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes wall and CPU seconds from one step's end to the next."""

    def __init__(self) -> None:
        self.record: dict[str, list[Any]] = {"wall_s": [], "cpu_s": [], "parts": [], "lengths": []}

    def on_train_begin(self, *unused: Any, **also_unused: Any) -> None:
        """The first step begins."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
        """A step is done: generation, rewards, update."""
        wall, cpu, trainer = time.perf_counter(), time.process_time(), self.trainer
        step_s = wall - self._wall
        self.record["wall_s"].append(step_s)
        self.record["cpu_s"].append(cpu - self._cpu)
        self.record["parts"].append(
            {"generate_s": trainer.generate_s, "train_s": step_s - trainer.generate_s, "step_s": step_s}
        )
        self.record["lengths"].append(sum(trainer.num_sampled) / len(trainer.num_sampled))
        trainer.generate_s, self._wall, self._cpu = 0.0, wall, cpu

    trainer: TimedTrainer


def settings(given: argparse.Namespace) -> GRPOConfig:
    """TRL's settings for the step, what costs it time and buys nothing here turned off."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return GRPOConfig(
        output_dir=str(given.out) + ".trl",
        per_device_train_batch_size=given.num_prompts * given.num_samples // world_size,
        gradient_accumulation_steps=1, num_generations=given.num_samples, num_iterations=1,
        max_steps=given.steps, max_completion_length=given.new_tokens, temperature=1.0, beta=0.0,
        # The end of sequence is never sampled, so every completion has all its tokens.
        generation_kwargs={"min_new_tokens": given.new_tokens},
        learning_rate=given.lr, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
        save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True, seed=given.seed,
        dataloader_num_workers=0, dataloader_pin_memory=False, ddp_find_unused_parameters=False,
    )  # fmt: skip


def main() -> None:
    """Run the steps and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder with model and tokenizer")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with a key 'prompt'")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--num-samples", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prompts = [json.loads(line)["prompt"] for line in given.prompts.read_text(encoding="utf-8").splitlines()]
    clock = StepClock()
    clock.trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            # The fastest of transformers' ways to run experts here; batched_mm wants far more memory.
            given.model, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        reward_funcs=by_hash, args=settings(given), callbacks=[clock],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip
    clock.trainer.train()
    rank = os.environ.get("RANK", "0")
    Path(f"{given.out}.{rank}.json").write_text(json.dumps(clock.record), encoding="utf-8")


if __name__ == "__main__":
    main()
