"""A toy of every family: random models of transformers whose every tensor shows when it is misplaced.

What they are saved as, and how their gradients are named, is transformers' own ``save_pretrained``: the
published layout of each family.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_SIZES: dict[str, object] = {
    # Widths differ from each other, so that a transposed weight cannot pass; the vocabulary is prime, so that
    # every tensor parallel size pads it; heads and experts are divided by 2, 4 and (experts) 8.
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 72, "max_position_embeddings": 64,
    "initializer_range": 0.08, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
_MOE: dict[str, object] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_DEEPSEEK: dict[str, object] = {
    "moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_shared_experts": 1,
    "num_key_value_heads": 8, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "head_dim": 8,
}  # fmt: skip
_YARN: dict[str, object] = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_LLAMA3: dict[str, object] = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

# Each toy: the prefix of transformers' classes, and config fields that differ from _SIZES.
FAMILY_TOYS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}),
    "qwen3": ("Qwen3", {}),
    "qwen3 moe": ("Qwen3Moe", {**_MOE, "norm_topk_prob": True, "mlp_only_layers": []}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 6}),
    "glm4 moe": (
        "Glm4Moe",
        {
            "moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True,
            "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1,
        },
    ),
    "deepseek v3": (
        "DeepseekV3",
        {
            **_DEEPSEEK, "q_lora_rank": 28, "n_group": 4, "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "moonlight": (
        "DeepseekV3",
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    ),
    "gpt oss": (
        "GptOss",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
}  # fmt: skip


def build_family_toy(name: str, *, seed: int = 0, **fields: object) -> Any:
    """The random model of toy ``name`` in fp32; ``fields`` differ from its config's."""
    import transformers

    prefix, own = FAMILY_TOYS[name]
    config = getattr(transformers, prefix + "Config")(**{**_SIZES, **own, **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + "ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("norm.weight", "layernorm.weight")):
                tensor.copy_(1 + torch.randn_like(tensor) * 0.2)
            elif key.endswith(("bias", "sinks")):
                tensor.copy_(torch.randn_like(tensor) * 0.2)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 0.08)
            if key.endswith(("gate.weight", "router.weight")):
                tensor.mul_(4.0)  # clear choices: a near tie may fall either way in float32
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a toy as transformers publishes it."""
    model.save_pretrained(folder, **options)
    return folder


def published(model: Any) -> dict[str, Tensor]:
    """The model's tensors by their published names."""
    folder = Path(tempfile.mkdtemp())
    try:
        save(model, folder)
        return load_file(folder / "model.safetensors")
    finally:
        shutil.rmtree(folder)


def published_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of the model's parameters by their published names; buffers are left out."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, own in zip(holder.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(own) if own.grad is None else own.grad)
    return {key: value for key, value in published(holder).items() if "e_score_correction_bias" not in key}


def quantize(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``weight`` in float8_e4m3fn, and the scales of its blocks of ``size`` rows and columns, float32."""
    rows, columns = (-(-extent // size) for extent in weight.shape[-2:])
    scales = torch.empty(*weight.shape[:-2], rows, columns)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            at = (..., slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
            scale = weight[at].float().abs().amax((-2, -1)) / 448
            scales[..., row, column] = scale
            stored[at] = (weight[at].float() / scale[..., None, None]).to(torch.float8_e4m3fn)
    return stored, scales


def write_quantized(plain: Path, folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    """Write a folder's linear layers in fp8, everything else as it is, and ``settings`` into its config.

    Returns the new folder, and its weights dequantised by the definition: each block times its scale.
    """
    (size, _), folder_tensors, weights = settings["weight_block_size"], {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        folder_tensors[name] = weights[name] = tensor
        if tensor.dim() < 2 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            continue
        stored, scales = quantize(tensor, size)
        folder_tensors[name], folder_tensors[name + "_scale_inv"] = stored, scales
        rows = scales.repeat_interleave(size, -2)[..., : tensor.shape[-2], :]
        spread = rows.repeat_interleave(size, -1)[..., : tensor.shape[-1]]
        weights[name] = (stored.float() * spread).bfloat16()
    folder.mkdir(parents=True)
    save_file(folder_tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def prediction_layer(tensors: dict[str, Tensor], num_layers: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A multi-token prediction layer as DeepSeek-V3 and GLM-4.5 publish it, with random weights.

    It is a layer like the model's last, one number further, and what joins it to the model.
    """
    generator = torch.Generator().manual_seed(seed)
    last, after = f"model.layers.{num_layers - 1}.", f"model.layers.{num_layers}."
    embedding = tensors["model.embed_tokens.weight"]
    norm = tensors["model.norm.weight"]
    shapes = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    shapes |= {"enorm.weight": norm, "hnorm.weight": norm, "shared_head.norm.weight": norm}
    shapes |= {"embed_tokens.weight": embedding, "shared_head.head.weight": embedding}
    shapes["eh_proj.weight"] = torch.empty(norm.numel(), 2 * norm.numel(), dtype=norm.dtype)
    return {
        after + name: torch.randn(like.shape, generator=generator).to(like.dtype)
        for name, like in shapes.items()
    }
