"""Megatron-Core's silent wrong numbers that mtrl builds around: each reproduced, so that we learn of its end.

A test that fails here means that the defect is gone and what avoids it may go too. Defects mended in place
are in test_megatron_mends.py and test_expert_gradients.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.toy_runs import samples
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save

KV_RANK, HIDDEN, LENGTH = 8, 32, 6


def down_projection_gradient() -> torch.Tensor:
    """On a rank: the gradient of its rows of the KV down projection in Megatron's local latent attention."""
    from mtrl.models.backends.torch_native.attention import CoreAttention
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    tp = torch.distributed.get_world_size()
    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(f"megatron:t{tp}")))
    parallel_groups.seed_everything(1, groups)
    config = MLATransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=KV_RANK,
        qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8, rope_type="rope", rotary_scaling_factor=1.0,
        add_bias_linear=False, tensor_model_parallel_size=tp, sequence_parallel=tp > 1,
        transformer_impl="local", perform_initialization=False, use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    column = ColumnParallelLinear
    attention = MLASelfAttention(
        config,
        MLASelfAttentionSubmodules(
            linear_q_proj=column, linear_q_down_proj=column, linear_q_up_proj=column,
            linear_kv_down_proj=column, linear_kv_up_proj=column, core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp, kv_layernorm=IdentityOp,
        ),
        1, AttnMaskType.causal, pg_collection=groups.collection,
    )  # fmt: skip
    generator, rank = torch.Generator().manual_seed(0), torch.distributed.get_rank()
    for name, parameter in sorted(attention.named_parameters()):
        dim = 1 if "linear_proj" in name else 0
        shape = list(parameter.shape)
        shape[dim] *= tp
        whole = torch.randn(shape, generator=generator) * 0.3
        parameter.data.copy_(whole.chunk(tp, dim)[rank])
    hidden, slope = (torch.randn(LENGTH, 1, HIDDEN, generator=generator).chunk(tp)[rank] for _ in range(2))
    output, _ = attention(hidden.clone().requires_grad_(), None)
    (output * slope).sum().backward()
    gradient: torch.Tensor = attention.linear_kv_down_proj.weight.grad
    return gradient


def test_the_rotary_keys_gradient_lacks_other_ranks_heads(world: World) -> None:
    # Avoided by `LatentAttention`: down projections that every rank holds whole.
    (expected,) = world.run(down_projection_gradient, size=1)
    found = torch.cat(world.run(down_projection_gradient, size=2))
    torch.testing.assert_close(found[:KV_RANK], expected[:KV_RANK], rtol=1e-4, atol=1e-5)
    difference = (found[KV_RANK:] - expected[KV_RANK:]).norm() / expected[KV_RANK:].norm()
    assert difference > 1e-2, "the rotary key's gradient is right now"


def first_step(folder: str, overrides: dict[str, Any]) -> list[float]:
    """On a rank: loss and gradient norm of the first step under a pipeline of two ranks with two chunks
    each.
    """
    from mtrl.config_engines import OptimizerSection
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf
    from mtrl.objectives import SftLoss
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec
    from mtrl.policy import make_microbatches
    from mtrl.trainer import Trainer

    layout = RankLayout.from_spec(parse_training_spec("megatron:p2"))
    groups = parallel_groups.create(layout, virtual_pipeline_size=2)
    parallel_groups.seed_everything(1, groups)
    model = build_model(load_model_config(Path(folder)), groups, num_chunks=2, **overrides)
    load_hf(model, Path(folder))
    trainer = Trainer(model, OptimizerSection(lr=1e-3))
    trainer.start_phase(total_steps=1, lr=1e-3, warmup_steps=0)
    microbatches = make_microbatches(samples([20] * 8, seed=1), model, max_tokens=40, pad_token_id=0)
    step = trainer.step(microbatches, SftLoss())
    return [step.loss, step.grad_norm]


def test_interleaved_stages_cross_their_messages_over_gloo(world: World, tmp_path: Path) -> None:
    # Avoided by `megatron_config`: sends and receives of their own, overlapped (right: test_parity.py).
    save(build_family_toy("qwen3"), tmp_path)
    right, stock = (
        world.run(first_step, {"folder": str(tmp_path), "overrides": overrides}, size=2)[0]
        for overrides in ({}, {"overlap_p2p_comm": False, "batch_p2p_comm": True})
    )
    assert stock != pytest.approx(right, rel=1e-3), "batched messages arrive in order now"


def refusals() -> dict[str, str]:
    """On a rank: what Megatron says of two models that it builds once it is not asked."""
    from mtrl.parallel.megatron_ready import MEGATRON_0_19

    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    said = {"latent": ""}
    try:
        TransformerConfig(
            **sizes, num_moe_experts=2, add_bias_linear=True, expert_tensor_parallel_size=2,
            expert_model_parallel_size=1,
        )  # fmt: skip
        said["biases"] = ""
    except (AssertionError, ValueError) as error:
        said["biases"] = str(error)
    if MEGATRON_0_19:
        from megatron.core.tensor_parallel import ColumnParallelLinear as Linear
        from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
        from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules

        config = MLATransformerConfig(
            **sizes, q_lora_rank=None, qk_layernorm=True, normalization="RMSNorm", transformer_impl="local"
        )
        spec = MLASelfAttentionSubmodules(
            linear_q_proj=Linear,
            linear_kv_up_proj=Linear,
            linear_proj=Linear,
            q_layernorm=None,
            kv_layernorm=torch.nn.LayerNorm,
        )
        try:
            QKNormConfigResolver(config, spec).resolve()
        except (RuntimeError, ValueError) as error:
            said["latent"] = str(error)
    return said


def test_what_is_built_past_megatrons_refusals_is_still_refused(world: World) -> None:
    # Avoided by `megatron_config` (biases) and by `LatentAttention._resolve_qk_norm_config` (0.19).
    from mtrl.parallel.megatron_ready import MEGATRON_0_19

    (said,) = world.run(refusals, size=1)
    assert "ETP" in said["biases"] or "expert_tensor" in said["biases"], "expert biases are allowed now"
    assert bool(said["latent"]) == MEGATRON_0_19, "0.19 builds queries without a rank now"
