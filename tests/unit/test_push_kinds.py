"""What a trainer has by its kinds' ranges is what its weight map says; plans and scores of them agree."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mtrl.models.backends.torch_native.places import places
from mtrl.models.config import ModelConfig
from mtrl.models.families import family_of, load_model_config
from mtrl.models.gather import held_boxes
from mtrl.models.stages import Stages
from mtrl.models.transfers import Boxes
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from mtrl.weight_push.kinds import Engines, alike_of, kinds_of
from mtrl.weight_push.nodes import plan_alike, plan_nodes
from mtrl.weight_push.score import compare, score
from tests.family_toys import FAMILY_TOYS
from tests.property.node_bounds import check_plan, masks
from tests.unit.test_family_configs import written

pytestmark = pytest.mark.one_stack

CONFIGS = Path(__file__).parents[1] / "model_configs"
TRAINERS = (
    ("megatron:d1", 1), ("megatron:(attn:d2t2|ffn:e4)", 1), ("megatron:(attn:t4|ffn:t2e2)", 1),
    ("megatron:(attn:p2t2d2|ffn:e2t2)", 1), ("megatron:(attn:p2d2|ffn:e2)", 2), ("megatron:p4d2", 1),
)  # fmt: skip


def config_of(toy: str, **fields: object) -> ModelConfig:
    hf = written(toy, **fields)
    return family_of(hf).read_config(hf)


def trainer(config: ModelConfig, spec: str, num_chunks: int) -> tuple[RankLayout, Stages, str]:
    """Without expert axes where there are no experts."""
    parsed = parse_training_spec(spec)
    if config.moe is None:
        attn = parsed.attn
        text = f"megatron:d{attn.dp}p{attn.pp}t{attn.tp}c{attn.cp}"
        parsed = parse_training_spec(text)
    layout = RankLayout.from_spec(parsed)
    return layout, Stages.balanced(config.num_layers, parsed.attn.pp, num_chunks), str(parsed)


@pytest.mark.parametrize("toy", FAMILY_TOYS)
@pytest.mark.parametrize(("spec", "num_chunks"), TRAINERS)
def test_the_trainer_s_ranges_are_its_weight_map_s_boxes(toy: str, spec: str, num_chunks: int) -> None:
    config = config_of(toy)
    layout, stages, _ = trainer(config, spec, num_chunks)
    weight_map = WeightMap(config=config, layout=layout, stages=stages, places=places(config))
    engines = Engines(spec=parse_rollout_spec(f"vllm:d{layout.world_size}"))
    kinds = kinds_of(config, layout, engines, stages, 2)
    shapes = weight_map.hf_shapes()
    assert {name for kind in kinds for name in kind.all_names()} == set(shapes)
    found = by_rank(kinds, layout, engines, "have")
    for expected, boxes in zip(held_boxes(weight_map), found, strict=True):
        one, other = masks(expected, shapes), masks(boxes, shapes)
        assert all((one[name] == other[name]).all() for name in shapes)
    kept = weight_map.hf_dtypes()
    for kind in kinds:
        assert all(shapes[name] == kind.shape for name in kind.all_names())
        assert all((kind.itemsize == 4) == (name in kept) for name in kind.all_names())


def by_rank(kinds: Any, layout: RankLayout, engines: Engines, side: str) -> list[Boxes]:
    found: list[dict[str, Any]] = [{} for _ in range(layout.world_size)]
    for alike in alike_of(kinds, layout, engines):
        for box, ranks in getattr(alike, side).items():
            for name in alike.names:
                for rank in ranks:
                    found[rank][name] = (*found[rank].get(name, ()), box)
    return list(found)


# 2 to 8 nodes of 1 to 4 ranks; the same world on both sides.
PUSHES = (
    ("megatron:(attn:d2t2|ffn:e4)", "vllm:d2t2", True, 2),
    ("megatron:(attn:d4t2|ffn:e8)", "vllm:d2t4", True, 2),
    ("megatron:(attn:d4t2|ffn:e8)", "vllm:d8", False, 1),
    ("megatron:(attn:p2d2t2|ffn:e2t2)", "vllm:d4t2", False, 4),
    ("megatron:(attn:p4d2t2|ffn:e4)", "vllm:d2t8", True, 4),
    ("megatron:(attn:p2d8|ffn:e8)", "vllm:d4t4", False, 3),
    ("megatron:(attn:p2t4d2|ffn:t4e2)", "vllm:t8d2", True, 2),
)


@pytest.mark.parametrize("toy", ["qwen3 moe", "deepseek v3", "llama tied", "gpt oss"])
@pytest.mark.parametrize(("spec", "rollout", "expert_parallel", "gpus_per_node"), PUSHES)
def test_a_node_receives_its_need_minus_its_have_and_so_does_each_rank(
    toy: str, spec: str, rollout: str, expert_parallel: bool, gpus_per_node: int
) -> None:
    config = config_of(toy)
    layout, stages, _ = trainer(config, spec, 1)
    apart = config.moe is not None and (expert_parallel or config.family == "gpt_oss")
    engines = Engines(spec=parse_rollout_spec(rollout), expert_parallel=apart)
    if config.family == "gpt_oss":
        config = dataclasses.replace(config, num_kv_heads=8, num_attention_heads=16)
    kinds = kinds_of(config, layout, engines, stages, 2)
    shapes = {name: kind.shape for kind in kinds for name in kind.all_names()}
    node_of = [rank // gpus_per_node for rank in range(layout.world_size)]
    have, need = (by_rank(kinds, layout, engines, side) for side in ("have", "need"))
    plan, traffic = plan_alike(
        alike_of(kinds, layout, engines), node_of, list(shapes), range(layout.world_size)
    )
    check_plan(plan, shapes, have, need, node_of)
    bound = score(kinds, layout, engines, gpus_per_node)
    assert bound.received.tolist() == traffic.received.tolist()
    assert (bound.needed - bound.received).tolist() == traffic.local.tolist()
    assert bound.into_nodes.tolist() == traffic.into_nodes(node_of).tolist()
    # From a list of all boxes comes a plan of the same traffic.
    listed = plan_nodes(list(shapes), have, need, node_of)
    assert listed.received(layout.world_size) == plan.received(layout.world_size)
    check_plan(listed, shapes, have, need, node_of)


def test_load_is_shared_out() -> None:
    """Within one box of the largest flow, on a model all of whose ranks could send and receive alike."""
    config = load_model_config(CONFIGS / "Qwen3-30B-A3B")
    layout, stages, _ = trainer(config, "megatron:(attn:d16|ffn:e8)", 1)
    engines = Engines(spec=parse_rollout_spec("vllm:d8t2"))
    kinds = kinds_of(config, layout, engines, stages, 2)
    one_node_has_all = plan_alike(alike_of(kinds, layout, engines), [r // 8 for r in range(16)], [], ())[1]
    assert one_node_has_all.received_across.sum() == 0
    assert one_node_has_all.sent_inside.max() <= 1.01 * one_node_has_all.sent_inside.mean()
    across = plan_alike(alike_of(kinds, layout, engines), [r // 4 for r in range(16)], [], ())[1]
    assert across.received_across.max() <= 1.01 * across.received_across.mean()
    assert across.sent_across.max() <= 1.01 * across.sent_across.mean()


def test_the_same_layout_on_both_sides_moves_nothing_but_what_is_replicated() -> None:
    config = load_model_config(CONFIGS / "Qwen3-30B-A3B")
    layout, stages, _ = trainer(config, "megatron:(attn:d8|ffn:e8)", 1)
    engines = Engines(spec=parse_rollout_spec("vllm:d2t4"))
    best, *others = compare(lambda each: kinds_of(config, layout, each, stages, 2), layout, engines, 8)
    assert str(best.engines) == "vllm:t8 with expert parallelism"
    assert best.received.tolist() == [0] * 8 and best.local_share == 1
    assert {str(each.engines) for each in others} == {
        "vllm:t8", "vllm:d2t4", "vllm:d2t4 with expert parallelism", "vllm:d4t2",
        "vllm:d4t2 with expert parallelism", "vllm:d8",
    }  # fmt: skip
    needed = [int(each.needed.max()) for each in others]
    assert max(needed) == 2 * 30_532_122_624  # bfloat16 of every weight on every rank


@pytest.mark.parametrize(
    ("toy", "fields", "rollout", "message"),
    [
        ("qwen3 moe", {}, "vllm:t16", "vllm:t16: attention heads 8 cannot be split by t16"),
        ("qwen3 moe", {"num_attention_heads": 24}, "vllm:t6", "4 KV heads cannot be shared evenly by t6"),
        (
            "qwen3 moe",
            {"num_attention_heads": 12, "vocab_size": 192},
            "vllm:t3",
            "KV heads 4 cannot be split",
        ),
        ("qwen3 moe", {"num_attention_heads": 12}, "vllm:t3", "vocabulary rows 128 cannot be split by t3"),
        (
            "qwen3 moe",
            {"moe_intermediate_size": 42},
            "vllm:t4",
            "expert hidden size 42 cannot be split by t4",
        ),
        (
            "qwen3 moe",
            {"num_experts": 2},
            "vllm:t4 ep",
            "2 experts are too few for expert parallelism over t4",
        ),
        ("glm4 moe", {"moe_intermediate_size": 42}, "vllm:t4 ep", "shared expert hidden size 42 cannot be"),
        ("llama", {"intermediate_size": 70}, "vllm:t4", "MLP hidden size 70 cannot be split by t4"),
        ("qwen3", {}, "vllm:t2 ep", "expert parallelism, but qwen3 has no experts"),
        ("gpt oss", {}, "vllm:t2", "use expert parallelism"),
        ("qwen3 moe", {}, "vllm:p2", "without engine pipelines"),
        ("qwen3 moe", {}, "sglang:t2", "mtrl samples with vllm"),
    ],
)
def test_engines_that_do_not_fit_are_refused(
    toy: str, fields: dict[str, object], rollout: str, message: str
) -> None:
    config = config_of(toy, **fields)
    spec, _, expert_parallel = rollout.partition(" ")
    engines = Engines(spec=parse_rollout_spec(spec), expert_parallel=bool(expert_parallel))
    layout, stages, _ = trainer(config, "megatron:d1", 1)
    with pytest.raises(LayoutError, match=message):
        kinds_of(config, layout, engines, stages, 2)


def test_the_config_folders_are_published_models() -> None:
    """Billions of weights as they are known, without multi-token prediction layers."""
    known = {"Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235.1, "DeepSeek-V3": 671.0, "Kimi-K2": 1026.4}
    assert {path.parent.name for path in CONFIGS.glob("*/config.json")} == set(known)
    for name, billions in known.items():
        config = load_model_config(CONFIGS / name)
        layout, stages, _ = trainer(config, "megatron:d1", 1)
        kinds = kinds_of(config, layout, Engines(spec=parse_rollout_spec("vllm:d1")), stages, 1)
        num_weights = sum(
            len(kind.all_names())
            * kind.box((0, kind.shape[kind.dim or 0]), (0, kind.num_experts)).num_elements
            for kind in kinds
        )
        assert num_weights / 1e9 == pytest.approx(billions, abs=0.1), name
        assert json.loads((CONFIGS / name / "config.json").read_text())["architectures"]
