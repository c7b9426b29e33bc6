"""Prompts for the toy models of the engine's tests, and transformers as the reference for every number."""

from typing import Any

import torch
from torch import Tensor

from mtrl.batch import Completion, Prompt
from tests.toys import VOCAB_SIZE

ENGINE_SIZES = {
    "vocab_size": 250, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    # The one shape of latent attention that vLLM's kernel for CPUs has.
    "num_key_value_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "head_dim": 64,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
ENGINE_TOYS: dict[str, dict[str, Any]] = {
    "llama tied": {},
    "qwen2": {},
    "qwen2 moe": {"mlp_only_layers": []},
    "mixtral": {},
    "olmoe": {},
    "glm4 moe": {},
    "gpt oss": {"rope_parameters": {**_YARN, "truncate": False}},
    "moonlight": _LATENT,
    "deepseek v3": {**_LATENT, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
}
DENSE_TOYS = ("llama tied", "qwen2")
"""Those of them without experts."""


def toy_prompts(*lengths: int, seed: int = 0, first_id: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            prompt_id=first_id + i,
            tokens=tuple(torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()),
            text="",
            answer="",
        )
        for i, length in enumerate(lengths)
    ]


def reference_logits(model: torch.nn.Module, prompt: Prompt, completion: Completion) -> Tensor:
    """transformers' logits [token, vocabulary] from which each token of the completion was to be drawn."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt.tokens + completion.tokens])).logits[0]
    return logits[len(prompt.tokens) - 1 : -1]


def logprob_difference(
    model: torch.nn.Module, prompts: list[Prompt], completions: list[Completion], temperature: float = 1.0
) -> float:
    """Largest absolute difference between the engine's log-probabilities and transformers'."""
    of_id = {prompt.prompt_id: prompt for prompt in prompts}
    worst = 0.0
    for completion in completions:
        logits = reference_logits(model, of_id[completion.prompt_id], completion) / temperature
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        worst = max(worst, float((wanted - torch.tensor(completion.logprobs)).abs().max()))
    return worst
