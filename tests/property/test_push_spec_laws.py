"""Pushes between any two layouts, nodes of any size: plan and score are need minus have."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.models.config import ModelConfig
from mtrl.models.families import family_of
from mtrl.models.stages import Stages
from mtrl.models.transfers import Boxes
from mtrl.models.weight_map import check_model_fits
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import ParallelSpec, RolloutSpec
from mtrl.weight_push.kinds import Engines, alike_of, check_engines, kinds_of
from mtrl.weight_push.nodes import plan_alike
from mtrl.weight_push.score import score
from tests.property.node_bounds import check_plan
from tests.property.strategies import legal_training_specs
from tests.unit.test_family_configs import written
from tests.unit.test_push_kinds import by_rank

pytestmark = pytest.mark.one_stack

# Small, so that masks of every element of every rank are cheap.
SIZES = {
    "vocab_size": 71, "hidden_size": 6, "num_hidden_layers": 4, "intermediate_size": 16,
    "moe_intermediate_size": 8,
}  # fmt: skip
TOYS = {
    "qwen3 moe": {"head_dim": 2},
    "deepseek v3": {
        "q_lora_rank": 5, "kv_lora_rank": 3, "qk_nope_head_dim": 2, "v_head_dim": 2, "qk_rope_head_dim": 2,
    },
}  # fmt: skip


@functools.cache
def config_of(toy: str) -> ModelConfig:
    hf = written(toy, **SIZES, **TOYS[toy])
    return family_of(hf).read_config(hf)


@functools.cache
def trainers(toy: str) -> tuple[ParallelSpec, ...]:
    """Every layout of up to 16 ranks that the model fits."""
    return tuple(spec for spec in legal_training_specs(16) if fits(toy, spec))


def fits(toy: str, spec: ParallelSpec) -> bool:
    try:
        check_model_fits(config_of(toy), spec)
        Stages.balanced(config_of(toy).num_layers, spec.attn.pp)
    except LayoutError:
        return False
    return True


@st.composite
def pushes(draw: st.DrawFn) -> tuple[str, ParallelSpec, Engines, int]:
    """A model, a trainer, engines on the same ranks, and GPUs a node."""
    toy = draw(st.sampled_from(sorted(TOYS)))
    spec = draw(st.sampled_from(trainers(toy)))
    engines = []
    for tp in range(1, spec.world_size + 1):
        for expert_parallel in (False, True) if spec.world_size % tp == 0 else ():
            rollout = RolloutSpec(backend="vllm", dp=spec.world_size // tp, tp=tp)
            each = Engines(spec=rollout, expert_parallel=expert_parallel)
            try:
                check_engines(config_of(toy), each)
            except LayoutError:
                continue
            engines.append(each)
    return toy, spec, draw(st.sampled_from(engines)), draw(st.integers(1, spec.world_size))


@settings(deadline=None, max_examples=30)
@given(pushes())
def test_between_any_layouts_nodes_and_ranks_receive_need_minus_have(
    push: tuple[str, ParallelSpec, Engines, int],
) -> None:
    toy, spec, engines, gpus_per_node = push
    config, layout = config_of(toy), RankLayout.from_spec(spec)
    kinds = kinds_of(config, layout, engines, Stages.balanced(config.num_layers, spec.attn.pp), 2)
    shapes = {name: kind.shape for kind in kinds for name in kind.all_names()}
    node_of = [rank // gpus_per_node for rank in range(layout.world_size)]
    have: list[Boxes] = by_rank(kinds, layout, engines, "have")
    need: list[Boxes] = by_rank(kinds, layout, engines, "need")
    tensors = alike_of(kinds, layout, engines)
    plan, traffic = plan_alike(tensors, node_of, list(shapes), range(layout.world_size))
    check_plan(plan, shapes, have, need, node_of)
    bound = score(kinds, layout, engines, gpus_per_node)
    assert bound.received.tolist() == traffic.received.tolist()
    assert bound.into_nodes.tolist() == traffic.into_nodes(node_of).tolist()
    assert (bound.needed - bound.received).tolist() == traffic.local.tolist()
