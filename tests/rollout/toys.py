"""Prompts for the toy models of the engine's tests, and transformers as the reference for every number."""

import torch
from torch import Tensor

from mtrl.batch import Completion, Prompt
from tests.toys import VOCAB_SIZE


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
