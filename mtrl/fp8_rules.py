"""What a config asks of FP8: whether backend, recipe and model can give it, before launch.

Rules between keys, which hold on any machine.
"""

from collections.abc import Iterator

from mtrl.config import Config
from mtrl.config_acceleration import Fp8Section
from mtrl.model_settings import backend_of, fp8_of
from mtrl.models.config import ModelConfig
from mtrl.models.precision import Fp8, Recipe
from mtrl.parallel.errors import ConfigError
from mtrl.parallel.spec import ParallelSpec

_WITHOUT_TE = "write model.backend=transformer_engine"
_NO_PARAMETERS: dict[Recipe, str] = {
    "fp8_delayed": "whose scales of weights come from earlier steps, which another layout has none of",
    "mxfp8": "whose parameters Megatron-Core gathers in bf16 over the gradients' buffer, which is not built",
}


def check_fp8(config: Config, actor: ParallelSpec, model: ModelConfig) -> None:
    """Raise ConfigError for a way of FP8 that cannot be: the key, what was given, the fix."""
    fp8, section = fp8_of(config), config.model.fp8
    if fp8 is None:
        if section != Fp8Section():
            raise ConfigError(
                f"model.fp8: given with model.precision {config.model.precision}, which has no FP8; write "
                "model.precision=fp8_blockwise, or leave the section out"
            )
        return
    if backend_of(config) == "torch_native" and fp8.recipe != "fp8_blockwise":
        raise ConfigError(
            f"model.precision: given {fp8.recipe}, but torch_native computes fp8_blockwise alone; write "
            f"that, or {_WITHOUT_TE}"
        )
    _check_bf16_layers(config, fp8, actor, model)
    if fp8.parameters:
        _check_parameters(config, fp8)
    recomputes_norms = config.actor.recompute == "selective" and "layernorm" in config.actor.recompute_modules
    if fp8.recipe == "fp8_delayed" and recomputes_norms:
        raise ConfigError(
            "actor.recompute_modules: given layernorm with model.precision fp8_delayed, under which "
            "Megatron-Core recomputes no norms; take it out, or write model.precision=fp8_blockwise"
        )


def check_fp8_widths(config: Config, actor: ParallelSpec, model: ModelConfig) -> None:
    """Raise ConfigError where a rank's share of a linear is of a width that Transformer Engine's products in
    FP8 do not take.
    """
    fp8 = fp8_of(config)
    if fp8 is None or backend_of(config) == "torch_native":
        return
    multiple = 32 if fp8.recipe == "mxfp8" else 16
    for name, size, axis, num_ranks in _widths(model, actor):
        if size % (multiple * num_ranks):
            share = f"{size / num_ranks:g} on each of {num_ranks} ranks of {axis}" if num_ranks > 1 else size
            raise ConfigError(
                f"model.precision: given {fp8.recipe} for a model whose {name} is {share}, but products in "
                f"FP8 take multiples of {multiple}; write model.precision=bf16, or another layout"
            )


def _widths(model: ModelConfig, actor: ParallelSpec) -> Iterator[tuple[str, int, str, int]]:
    """What linears of layers take and give: name, size, the axis that cuts it and its number of ranks."""
    tp, etp, moe, mla = actor.attn.tp, actor.ffn.etp, model.moe, model.mla
    yield "hidden_size", model.hidden_size, "attn.tp", 1
    if mla is not None:
        heads = model.num_attention_heads
        yield "q_lora_rank", mla.query_rank or 0, "attn.tp", 1
        yield "kv_lora_rank", mla.kv_rank, "attn.tp", 1
        yield "kv_lora_rank + qk_rope_head_dim", mla.kv_rank + mla.rope_dim, "attn.tp", 1
        yield "width of all queries", heads * (mla.nope_dim + mla.rope_dim), "attn.tp", tp
        yield "width of all keys and values", heads * (mla.nope_dim + mla.value_dim), "attn.tp", tp
        yield "width of all heads", heads * mla.value_dim, "attn.tp", tp
    else:
        heads = model.num_attention_heads + 2 * model.num_kv_heads
        yield "width of all heads", model.num_attention_heads * model.head_dim, "attn.tp", tp
        yield "width of all queries, keys and values", heads * model.head_dim, "attn.tp", tp
    if len(model.moe_layers) < model.num_layers:
        yield "intermediate_size", model.intermediate_size, "attn.tp", tp
    if moe is not None:
        yield "experts' width", moe.expert_hidden_size, "ffn.etp", etp
        yield "shared experts' width", moe.shared_hidden_size, "attn.tp", tp


def _check_bf16_layers(config: Config, fp8: Fp8, actor: ParallelSpec, model: ModelConfig) -> None:
    kept = fp8.bf16_first_layers + fp8.bf16_last_layers
    if kept >= model.num_layers:
        raise ConfigError(
            f"model.fp8: {fp8.bf16_first_layers} first and {fp8.bf16_last_layers} last layers in bf16 leave "
            f"none of {model.num_layers} for FP8; lower them, or write model.precision=bf16"
        )
    most = model.num_layers // actor.attn.pp
    if backend_of(config) != "torch_native" and max(fp8.bf16_first_layers, fp8.bf16_last_layers) > most:
        raise ConfigError(
            f"model.fp8: {fp8.bf16_first_layers} first and {fp8.bf16_last_layers} last layers in bf16, of "
            f"which Megatron-Core takes at most the {most} of one of {actor.attn.pp} pipeline stages; "
            "lower them"
        )
    if kept and fp8.recipe == "fp8_delayed":
        raise ConfigError(
            "model.fp8: bf16_first_layers and bf16_last_layers, but Megatron-Core keeps no layer in bf16 "
            "under fp8_delayed; leave them 0, or write model.precision=fp8_blockwise"
        )


def _check_parameters(config: Config, fp8: Fp8) -> None:
    reasons = {
        f"with torch_native, whose parameters are bf16; {_WITHOUT_TE}": backend_of(config) == "torch_native",
        f"with {fp8.recipe}, {_NO_PARAMETERS.get(fp8.recipe)}; write model.precision=fp8_blockwise": (
            fp8.recipe in _NO_PARAMETERS
        ),
        "without the distributed optimizer, the only one of Megatron-Core's that has their masters; write "
        "actor.optimizer.distributed=true": not config.actor.optimizer.distributed,
        "with actor.optimizer.offload_fraction, which keeps other masters; write 0": (
            config.actor.optimizer.offload_fraction > 0
        ),
        "with algorithm.kl_coef, whose reference takes the parameters' place, which those in FP8 do not give "
        "up; write 0, or model.fp8.parameters=false": bool(config.algorithm.kl_coef),
        "with actor.offload, which moves storages, and parameters in FP8 have none of their own; write none, "
        "or model.fp8.parameters=false": config.actor.offload != "none",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"model.fp8.parameters: true {reason}")
