"""Why ``models/router.py`` has losses of its own: Megatron's on packed rows. No report of any is known.

One router over a row of eight tokens, four experts, two of them chosen, as each tensor parallel rank has its
half. Under ``calculate_per_token_loss`` the gradient of the load-balancing loss A (and of the z-loss) should
be that of n A, n the row's real tokens: it is divided by the count of tokens later. A test that fails on a
new Megatron says that a defect is gone.
"""

from typing import Any

import torch
from torch import Tensor

from mtrl.parallel.megatron_ready import MEGATRON_0_19
from tests.distributed.world import World

NUM_TOKENS, NUM_EXPERTS, TOP_K = 8, 4, 2


def row() -> Tensor:
    return torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(3)) * 2


def imbalance(logits_TE: Tensor) -> Tensor:
    """A of these tokens; see the top of ``models/router.py``."""
    scores = logits_TE.softmax(-1)
    counts = torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=NUM_EXPERTS)
    return NUM_EXPERTS * (counts / (len(scores) * TOP_K) * scores.mean(0)).sum()


def gradient_of_definition(num_real: int) -> Tensor:
    """Of n A, for the row's first ``num_real`` tokens."""
    logits = row().requires_grad_()
    (num_real * imbalance(logits[:num_real])).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad


def route(spec: str, num_real: int, has_bias: bool) -> dict[str, Any]:
    """On a rank: the gradient that Megatron's router gives its logits, or what it raises."""
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(spec)))
    tp = groups.layout.spec.attn.tp
    score = "sigmoid" if has_bias else "softmax"
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=NUM_EXPERTS,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none" if has_bias else "aux_loss",
        moe_aux_loss_coeff=0.0 if has_bias else 1.0, moe_router_score_function=score,
        moe_router_enable_expert_bias=has_bias, calculate_per_token_loss=True, tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1, use_cpu_initialization=True, add_bias_linear=False,
        moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    router = TopKRouter(config, pg_collection=groups.collection).train()
    router.set_layer_number(1)
    logits = row().chunk(tp)[groups.coordinates.tp].unsqueeze(1).requires_grad_()
    is_padding = None
    if num_real < NUM_TOKENS:
        is_padding = (torch.arange(NUM_TOKENS) >= num_real).chunk(tp)[groups.coordinates.tp].unsqueeze(1)
    try:
        probs, _ = router.routing(logits, padding_mask=is_padding)
    except RuntimeError as error:
        return {"raised": str(error)}
    (probs * 0.0).sum().backward()
    return {"gradient": logits.grad.squeeze(1)}


def found(world: World, spec: str, num_real: int) -> Tensor:
    size = 2 if "t2" in spec else 1
    ranks = world.run(route, {"spec": spec, "num_real": num_real, "has_bias": False}, size=size)
    return torch.cat([rank["gradient"] for rank in ranks])


def test_alone_megatron_means_the_same_loss(world: World) -> None:
    torch.testing.assert_close(found(world, "megatron:d1", 6), gradient_of_definition(6))


def test_under_tensor_parallelism_megatron_016_weakens_the_loss(world: World) -> None:
    factor = 1.0 if MEGATRON_0_19 else 0.5  # 0.19 multiplies by the size of tp x cp
    torch.testing.assert_close(found(world, "megatron:t2", 8), gradient_of_definition(8) * factor)


def test_beside_padding_megatron_019_strengthens_it(world: World) -> None:
    # Its sum over ranks is made in place, so that the count it takes for this rank's is already all ranks'.
    factor = 2.0 if MEGATRON_0_19 else 1.0
    torch.testing.assert_close(found(world, "megatron:t2", 6), gradient_of_definition(6) * factor)


def test_a_row_of_padding_makes_megatrons_gradient_nan(world: World) -> None:
    assert bool(found(world, "megatron:d1", 0).isnan().any())


def test_megatron_cannot_count_choices_for_the_bias_beside_padding(world: World) -> None:
    arguments = {"spec": "megatron:d1", "num_real": 6, "has_bias": True}
    assert "must match the size" in world.run(route, arguments, size=1)[0]["raised"]
