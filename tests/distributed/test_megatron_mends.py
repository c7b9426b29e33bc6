"""Each mend is needed by exactly the Megatron-Core versions it names; experts': test_expert_gradients.py."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtrl.parallel import megatron_mends
from mtrl.parallel.megatron_mends import MENDS
from tests.distributed.world import World

HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = pytest.mark.skipif(
    HAS_TRANSFORMER_ENGINE, reason="these defects show without Transformer Engine only"
)


def route_in_float32() -> None:
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    tokens = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    scores = utils.router_gating_linear(tokens, weight, None, torch.float32)
    torch.testing.assert_close(scores, tokens @ weight.T)
    scores.sum().backward()


def build_a_sharded_layer() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = _make_groups()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, perform_initialization=False,
        use_cpu_initialization=True,
    )  # fmt: skip
    layer = ColumnParallelLinear(
        8, 8, config=config, init_method=torch.nn.init.zeros_, tp_group=groups.attn.tp, bias=False
    )
    assert layer.weight.tensor_model_parallel


def recompute_an_output() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _make_groups()
    given = torch.randn(4, requires_grad=True)
    checkpoint = random.CheckpointWithoutOutput()
    output = checkpoint.checkpoint(torch.tanh, given)
    torch.testing.assert_close(output, torch.tanh(given))


class NoAttention(torch.nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


def build_latent_attention() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8, rope_type="rope", rotary_scaling_factor=1.0,
        add_bias_linear=False,
    )  # fmt: skip
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=NoAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        kv_layernorm=IdentityOp,
    )
    MLASelfAttention(config, submodules, 1, AttnMaskType.causal, pg_collection=_make_groups().collection)


def _make_groups() -> Any:
    from mtrl.parallel import groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    made = groups.create(RankLayout.from_spec(parse_training_spec("megatron:d1")))
    groups.seed_everything(1, made)
    return made


USES: dict[str, Callable[[], None]] = {
    "te_general_gemm": route_in_float32,
    "sharded_weights": build_a_sharded_layer,
    "mla_without_transformer_engine": build_latent_attention,
    "recompute_without_transformer_engine": recompute_an_output,
}
TESTED_ELSEWHERE = {"expert_gradients", "expert_gradient_norm", "expert_shards"}


def use(name: str, mended: bool) -> str:
    """What using the defective part raises: the error's name, or nothing."""
    if not mended:
        megatron_mends.undo(name)
    try:
        USES[name]()
    except (NameError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_mend_has_a_test_a_link_or_a_measured_reason() -> None:
    assert {each.name for each in MENDS} == set(USES) | TESTED_ELSEWHERE
    assert all(each.why and each.link for each in MENDS)


@pytest.mark.parametrize("name", USES)
def test_with_the_mend_it_runs(world: World, name: str) -> None:
    assert world.run(use, {"name": name, "mended": True}, size=1) == [""]


@pytest.mark.parametrize("name", USES)
def test_without_the_mend_exactly_its_versions_raise(world: World, name: str) -> None:
    is_needed = next(each for each in MENDS if each.name == name).is_needed
    raised = world.run(use, {"name": name, "mended": False}, size=1)[0]
    assert bool(raised) == is_needed, raised
