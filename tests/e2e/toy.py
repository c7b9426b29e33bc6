"""A job small enough to run in seconds: four digits of arithmetic, a two-layer Qwen3-MoE, two ranks."""

import json
from pathlib import Path

from mtrl.data.arithmetic import make_arithmetic

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "head_dim": 32, "hidden_act": "silu",
    "hidden_size": 64, "initializer_range": 0.05, "intermediate_size": 96, "max_position_embeddings": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 48, "norm_topk_prob": True,
    "num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 32,
}  # fmt: skip
NUM_TRAIN, NUM_EVAL = 24, 5

GRPO = """\
output_dir: runs/grpo
algorithm:
  name: grpo
  total_steps: 3
  prompts_per_step: 4
  max_tokens_per_microbatch: 64
  max_k3_kl: 1.0e-6
  warm_start: {total_steps: 4, samples_per_step: 6, learning_rate: 3.0e-3, warmup_steps: 1}
model: {init: model/config.json, tokenizer: task/tokenizer, precision: fp32}
actor:
  backend: "megatron:(attn:d2|ffn:e2)"
  optimizer: {lr: 1.0e-3}
rollout: {backend: "vllm:d2", n_samples: 4, max_new_tokens: 6, max_num_seqs: 64, kv_cache_bytes: 8388608}
data: {train: task/train.jsonl, warm_start: task/sft.jsonl, eval: task/eval.jsonl}
reward: {name: "rewards:digit_share"}
"""
SFT = """\
output_dir: runs/sft
algorithm: {name: sft, total_steps: 4, samples_per_step: 6, max_tokens_per_microbatch: 64}
model: {init: model/config.json, tokenizer: task/tokenizer, precision: fp32}
actor: {backend: "megatron:(attn:d2|ffn:e2)", optimizer: {lr: 3.0e-3}}
data: {train: task/sft.jsonl}
"""

REWARDS = """\
import random

import numpy
import torch


def digit_share(prompt, completion):
    \"\"\"A reward that an untrained model gets often enough to learn from.\"\"\"
    return sum(letter.isdigit() for letter in completion.text) / max(len(completion.text), 1)


def reseeding(prompt, completion):
    \"\"\"The same, by someone who reseeds every global generator with something new.\"\"\"
    torch.seed(), random.seed(), numpy.random.seed()
    return digit_share(prompt, completion)
"""


def write_toy(folder: Path) -> None:
    """Write task, model config, rewards and two run configs, whose paths are relative to ``folder``."""
    task = make_arithmetic(folder / "task", seed=1, num_eval=NUM_EVAL)
    for path in (task.train, task.sft):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:NUM_TRAIN]))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "grpo.yaml").write_text(GRPO)
    (folder / "sft.yaml").write_text(SFT)
