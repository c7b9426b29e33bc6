"""What a config's keys are to ``models/`` and in Megatron's words. Imports neither torch nor Megatron."""

from importlib.metadata import version
from typing import Any, Literal, get_args

from mtrl.config import Config
from mtrl.config_check import RANKS_PER_NODE
from mtrl.models.backends import Backend
from mtrl.models.precision import Fp8, Recipe
from mtrl.parallel.spec import ParallelSpec

RECIPES: tuple[Recipe, ...] = get_args(Recipe)
FLEX = ("deepep", "hybridep")
"""Dispatchers that are DeepEP's, through Megatron's ``flex``."""

# Megatron-Core's default, and what DeepEP's readme measures its kernels across nodes with.
_SMS_ON_A_NODE, _SMS_ACROSS = 20, 24


def backend_of(config: Config) -> Backend:
    """Whose layers the trainer uses."""
    # `auto` waits for a GPU to have run Transformer Engine's: docs/verified.md.
    return "torch_native" if config.model.backend == "auto" else config.model.backend


def weights_precision(config: Config) -> Literal["fp32", "bf16"]:
    """Dtype of weights and activations: FP8 training keeps bf16."""
    return "fp32" if config.model.precision == "fp32" else "bf16"


def fp8_of(config: Config) -> Fp8 | None:
    """How linears compute in FP8, or that they do not."""
    recipe = next((name for name in RECIPES if name == config.model.precision), None)
    if recipe is None:
        return None
    section = config.model.fp8
    usual: Literal["e4m3", "e5m2"] = "e5m2" if recipe == "fp8_delayed" else "e4m3"
    return Fp8(
        recipe=recipe,
        gradients=usual if section.gradients == "auto" else section.gradients,
        products=section.products,
        bf16_first_layers=section.bf16_first_layers,
        bf16_last_layers=section.bf16_last_layers,
        parameters=section.parameters,
    )


def moe_fields(config: Config, actor: ParallelSpec) -> dict[str, Any]:
    """What ``actor.moe`` and ``actor.tp_comm_overlap`` are in Megatron's ``TransformerConfig``."""
    moe = config.actor.moe
    switches = {
        "moe_permute_fusion": moe.permute_fusion,
        "moe_shared_expert_overlap": moe.shared_expert_overlap,
        "overlap_moe_expert_parallel_comm": moe.overlap_expert_communication,
        "tp_comm_overlap": config.actor.tp_comm_overlap,
    }
    fields: dict[str, Any] = {name: True for name, is_on in switches.items() if is_on}
    if moe.dispatcher in FLEX:
        fields |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": moe.dispatcher}
        if (num_sms := _num_sms(config, actor)) is not None:
            fields[_num_sms_field(moe.dispatcher)] = num_sms
    elif moe.dispatcher != "alltoall":
        fields["moe_token_dispatcher_type"] = moe.dispatcher
    return fields


def _num_sms(config: Config, actor: ParallelSpec) -> int | None:
    moe = config.actor.moe
    if moe.num_sms is not None or moe.dispatcher == "hybridep":
        return moe.num_sms
    return _SMS_ON_A_NODE if actor.ffn.ep * actor.ffn.etp <= RANKS_PER_NODE else _SMS_ACROSS


def _num_sms_field(dispatcher: str) -> str:
    """Megatron-Core 0.19 has one field for all backends; those of 0.16 warn there."""
    is_old = version("megatron-core").startswith("0.16.")
    return f"moe_{dispatcher}_num_sms" if is_old else "moe_flex_dispatcher_num_sms"
