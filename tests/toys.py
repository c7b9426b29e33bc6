"""Toy models: random Qwen3 and Qwen3-MoE of transformers, whose every tensor shows when it is misplaced."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtrl.models.boxes import Padding, Piece
from mtrl.models.config import ModelConfig
from mtrl.models.families import family_of
from mtrl.models.weight_map import RankWeights

Kind = Literal["dense", "moe"]
VOCAB_SIZE = 250
"""No multiple of 64, so that vLLM pads the vocabulary."""

SMALL: dict[str, object] = {
    # The widths differ from each other, so that a transposed weight cannot pass; the vocabulary is prime, so
    # that every tensor parallel size pads it.
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 72, "max_position_embeddings": 64,
    "moe_intermediate_size": 40, "rope_theta": 5000.0,
}  # fmt: skip
"""Sizes for layouts of up to t4, p4, e8 and etp4."""


def build_toy(kind: Kind, *, seed: int, tied: bool = False, **sizes: Any) -> torch.nn.Module:
    """A random Qwen3 or Qwen3-MoE in fp32, weights large enough that a misplaced one shows.

    ``sizes`` are fields of the Hugging Face config that differ from the defaults below.
    """
    import transformers

    fields: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=96, max_position_embeddings=512,
        initializer_range=0.08, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    experts: dict[str, Any] = dict(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        mlp_only_layers=[],
    )
    fields |= {key: value for key, value in sizes.items() if kind == "moe" or key not in experts}
    torch.manual_seed(seed)
    model: torch.nn.Module
    if kind == "moe":
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(experts | fields)))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))
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


def write_weights(model: torch.nn.Module, folder: Path) -> Path:
    """``config.json`` and all weights in one file."""
    write_folder(model, folder)
    tensors = {name: tensor.clone().contiguous() for name, tensor in hf_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hf_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights as a published checkpoint names and shapes them: experts one by one."""
    return hf_names(model, model.state_dict())


def hf_names(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of ``state_dict`` as a published checkpoint names and shapes them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
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


def tiny_config(
    *, vocab_size: int, num_layers: int, tied: bool, dense_layers: list[int] | None
) -> ModelConfig:
    """A config whose sizes every axis of 1, 2, 4 or 8 divides; ``dense_layers`` None is a dense model."""
    hf: dict[str, object] = {
        "hidden_size": 3, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 1,
        "intermediate_size": 8, "vocab_size": vocab_size, "num_hidden_layers": num_layers,
        "max_position_embeddings": 8, "tie_word_embeddings": tied, "architectures": ["Qwen3ForCausalLM"],
    }  # fmt: skip
    if dense_layers is not None:
        hf |= {
            "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "mlp_only_layers": dense_layers,
        }  # fmt: skip
    return family_of(hf).read_config(hf)


def empty_tensors(weights: RankWeights) -> dict[tuple[int, str], Tensor]:
    """All parameters that the pieces and padding of a rank name, full of NaN."""
    entries: tuple[Piece | Padding, ...] = (*weights.pieces, *weights.paddings)
    return {(entry.chunk, entry.local.name): torch.full(entry.local.shape, float("nan")) for entry in entries}
