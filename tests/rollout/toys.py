"""Toy models for the engine's tests: transformers is the reference for every number."""

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mtrl.batch import Completion, Prompt

Kind = Literal["dense", "moe"]
VOCAB_SIZE = 250
"""No multiple of 64, so that vLLM pads the vocabulary."""


def build_toy(kind: Kind, *, seed: int, tied: bool = False) -> torch.nn.Module:
    """A random 2-layer Qwen3 or Qwen3-MoE in fp32, weights large enough that a misplaced one shows."""
    import transformers

    sizes = dict(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=96, max_position_embeddings=512,
        initializer_range=0.08, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    experts = dict(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        mlp_only_layers=[],
    )
    torch.manual_seed(seed)
    model: torch.nn.Module
    if kind == "moe":
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.float().eval()


def write_folder(model: torch.nn.Module, folder: Path, *, tokenizer: bool = False) -> Path:
    """``config.json``, and a tokenizer of one letter a token if asked; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        from tokenizers import Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        letters = Tokenizer(
            models.WordLevel({chr(0x4E00 + i): i for i in range(VOCAB_SIZE)}, unk_token=chr(0x4E00))
        )
        letters.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder


def hf_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights as a published checkpoint names and shapes them: experts one by one."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:  # type: ignore[union-attr]
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                prefix = name.removesuffix("gate_up_proj") + str(expert)
                found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                found[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = down
        else:
            found[name] = tensor
    return found


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
