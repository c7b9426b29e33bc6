"""What a push to FP8 engines is scored at is what its plan moves: elements of one byte, and scales."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mtrl.models.backends.torch_native.places import places
from mtrl.models.config import ModelConfig
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.spec import parse_rollout_spec
from mtrl.rollout.fp8_weights import check_sliced, fp8_dtypes, fp8_names, with_scales
from mtrl.tools.push_score import PushScore
from mtrl.tools.show_layout import main
from mtrl.weight_push.fp8_images import PartsPlan
from mtrl.weight_push.fp8_kinds import Fp8Kinds
from mtrl.weight_push.kinds import Engines, Kind, alike_of, kinds_of
from mtrl.weight_push.nodes import NodePlan, plan_alike
from mtrl.weight_push.plan import plan_push, sendable_boxes, with_scale_boxes
from mtrl.weight_push.score import compare, score
from tests.rollout.fp8_scenarios import TOYS, write_config
from tests.unit.test_family_configs import written
from tests.unit.test_push_fp8 import CUT as REFUSED
from tests.unit.test_push_kinds import by_rank, trainer
from tests.unit.test_push_score import CONFIGS, cells

pytestmark = pytest.mark.one_stack

# Trainer, engines, expert parallelism, ranks of a node, whether sizes are `CUT`.
PUSHES = (
    ("megatron:t2", "vllm:d2", False, 1, True),
    ("megatron:(attn:d2t2|ffn:e4)", "vllm:d2t2", True, 2, False),
    ("megatron:(attn:d2t2|ffn:t2e2)", "vllm:d4", False, 2, True),
    ("megatron:(attn:p2t2d2|ffn:e2t2)", "vllm:d4t2", False, 4, False),
    ("megatron:(attn:p2d2t2|ffn:e4)", "vllm:d4t2", True, 3, False),
    ("megatron:(attn:t4d2|ffn:t4e2)", "vllm:d4t2", True, 4, False),
    ("megatron:(attn:d8|ffn:e8)", "vllm:d8", False, 4, False),
)
# Heads and experts that trainers split within blocks; engines of one rank take them.
CUT = {
    "hidden_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2, "moe_intermediate_size": 384,
}  # fmt: skip


def bytes_of(plan: NodePlan, sizes: Mapping[str, int], node_of: list[int]) -> tuple[list[int], list[int]]:
    """What each rank receives from others, and each node from other nodes."""
    received, into_nodes = [0] * len(node_of), [0] * (max(node_of) + 1)
    for each in (*plan.first.transfers, *plan.forwarded.transfers):
        num_bytes = each.box.num_elements * sizes[each.name]
        if each.source != each.target:
            received[each.target] += num_bytes
        if node_of[each.source] != node_of[each.target]:
            into_nodes[node_of[each.target]] += num_bytes
    return received, into_nodes


def sizes_of(weight_map: WeightMap, names: tuple[str, ...]) -> dict[str, int]:
    """An element's bytes on the wire, of every weight and of scales."""
    sizes = {name: 4 if name in weight_map.hf_dtypes() else 2 for name in weight_map.hf_shapes()}
    return sizes | {name: dtype.itemsize for name, dtype in fp8_dtypes(names).items()}


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize(("spec", "rollout", "apart", "gpus_per_node", "cut"), PUSHES)
def test_ranks_and_nodes_receive_what_the_plan_of_a_push_moves(
    tmp_path: Path, toy: str, spec: str, rollout: str, apart: bool, gpus_per_node: int, cut: bool
) -> None:
    fields = dict(CUT) if cut else {}
    if cut and "kv_lora_rank" in TOYS[toy]:
        fields["num_key_value_heads"] = CUT["num_attention_heads"]
    config = write_config(tmp_path, toy, **fields)
    layout, stages, _ = trainer(config, spec, 1)
    engines = Engines(spec=parse_rollout_spec(rollout), expert_parallel=apart and config.moe is not None)
    kinds = Fp8Kinds.of(config, layout, stages, 2)(engines)
    bound = score(kinds, layout, engines, gpus_per_node)
    # The plan that a push makes, from what weights' kinds in bfloat16 say that engines read.
    weight_map = WeightMap(config=config, layout=layout, stages=stages, places=places(config))
    names, node_of = fp8_names(config), [rank // gpus_per_node for rank in range(layout.world_size)]
    usual = kinds_of(config, layout, engines, stages, 2)
    need = with_scale_boxes(by_rank(usual, layout, engines, "need"), names)
    plan = plan_push(weight_map, need, node_of, fp8=names)
    sizes = sizes_of(weight_map, names)
    received, into_nodes = bytes_of(plan, sizes, node_of)
    assert bound.received.tolist() == received
    assert bound.into_nodes.tolist() == into_nodes
    assert bound.needed.tolist() == [
        sum(box.num_elements * sizes[name] for name, boxes in each.items() for box in boxes) for each in need
    ]
    held = sendable_boxes(weight_map, names)
    told = PartsPlan(plan, held, names, node_of).largest.first.transfers
    assert any(kind.overlaps for kind in kinds) == bool(told)
    # By flows, as large models are planned.
    traffic = plan_alike(alike_of(kinds, layout, engines), node_of, [], ())[1]
    assert traffic.received.tolist() == received
    assert traffic.into_nodes(node_of).tolist() == into_nodes


@pytest.mark.parametrize("toy", TOYS)
def test_kinds_are_every_weight_and_every_scale_in_its_shape_and_bytes(tmp_path: Path, toy: str) -> None:
    config = write_config(tmp_path, toy)
    layout, stages, _ = trainer(config, "megatron:(attn:d2t2|ffn:e4)", 1)
    weight_map = WeightMap(config=config, layout=layout, stages=stages, places=places(config))
    names = fp8_names(config)
    kinds = Fp8Kinds.of(config, layout, stages, 2)(Engines(spec=parse_rollout_spec("vllm:d2t2")))
    assert {name: kind.shape for kind in kinds for name in kind.all_names()} == with_scales(
        weight_map.hf_shapes(), names
    )
    found = {name: kind.itemsize for kind in kinds for name in kind.all_names()}
    assert found == sizes_of(weight_map, names)


def kinds_for(model: ModelConfig, spec: str) -> Any:
    layout, stages, _ = trainer(model, spec, 1)
    return Fp8Kinds.of(model, layout, stages, 2)


@pytest.mark.parametrize("case", REFUSED)
def test_engines_without_whole_blocks_are_refused_in_the_words_of_the_launch(
    tmp_path: Path, case: str
) -> None:
    toy, fields, text, apart, _, _ = REFUSED[case]
    config, spec = write_config(tmp_path, toy, **fields), parse_rollout_spec(text)
    with pytest.raises(LayoutError) as expected:
        check_sliced(config, spec, expert_parallel=apart)
    engines = Engines(spec=spec, expert_parallel=apart and config.moe is not None)
    with pytest.raises(LayoutError) as caught:
        kinds_for(config, f"megatron:d{spec.world_size}")(engines)
    assert str(caught.value) == str(expected.value)


def test_layouts_that_would_be_refused_are_not_compared(tmp_path: Path) -> None:
    config = write_config(tmp_path, "qwen3 moe")
    layout, stages, _ = trainer(config, "megatron:(attn:d8|ffn:e8)", 1)
    engines = Engines(spec=parse_rollout_spec("vllm:d8"))

    def in_bfloat16(each: Engines) -> tuple[Kind, ...]:
        return kinds_of(config, layout, each, stages, 2)

    def is_taken(each: Engines) -> bool:
        try:
            check_sliced(config, each.spec, expert_parallel=each.expert_parallel)
        except LayoutError:
            return False
        return True

    all_engines = {each.engines for each in compare(in_bfloat16, layout, engines, 4)}
    in_fp8 = {each.engines for each in compare(kinds_for(config, str(layout.spec)), layout, engines, 4)}
    assert in_fp8 == {each for each in all_engines if is_taken(each)}
    assert {str(each) for each in in_fp8} == {
        "vllm:d8", "vllm:d4t2", "vllm:d4t2 with expert parallelism",
    } and len(all_engines) == 7  # fmt: skip


TRAIN = "megatron:(attn:d16p16t4|ffn:e64)"
DEEPSEEK = ["--model", str(CONFIGS / "DeepSeek-V3"), "--rollout-dtype", "fp8"]


def test_the_tables_say_the_dtype_and_what_is_not_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([TRAIN, "vllm:d64t16", "--expert-parallel", *DEEPSEEK]) == 0
    printed = capsys.readouterr().out
    assert "a push in fp8 to vllm:d64t16 with expert parallelism" in printed
    assert "rollout layouts whose ranks receive the fewest bytes, in fp8" in printed
    assert cells(printed, "an engine rank reads")[1:] == ["43.1 GB", "43.1 GB", "44.2 TB"]
    assert "vllm:d32t32" not in printed  # an MLP of 18432 has no whole blocks there
    assert "No ranks of the trainer share a block" in " ".join(printed.split())
    write_config(tmp_path, "qwen3 moe", **CUT)
    arguments = ["megatron:(attn:t2|ffn:t2)", "vllm:d2", "--model", str(tmp_path), "--rollout-dtype"]
    assert main([*arguments, "fp8"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "those 4 bytes for each part of a block are not counted." in printed
    assert main([*arguments, "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "a push in bf16 to vllm:d2" in printed and "share" not in printed.partition("a push in")[2]


def test_of_a_large_model_an_engine_reads_a_byte_a_weight_and_a_4096th_more() -> None:
    train, rollout = "megatron:(attn:d16|ffn:e16)", "vllm:d2t8"
    start = time.process_time()
    one, other = (
        PushScore.of(train, rollout, CONFIGS / "DeepSeek-V3", 8, expert_parallel=True, dtype=dtype).given
        for dtype in ("bf16", "fp8")
    )
    assert time.process_time() - start < 10
    # Embedding, output layer and routers stay bfloat16: 2 of 671 billion, but of one rank's part more.
    assert 0.5 < other.needed.sum() / one.needed.sum() < 0.51


@pytest.mark.parametrize(
    ("model", "train", "rollout"),
    [
        ("DeepSeek-V3", TRAIN, "vllm:d64t16"),
        ("Kimi-K2", "megatron:(attn:d16p16t4|ffn:e32)", "vllm:d128t8"),
        ("Qwen3-235B-A22B", "megatron:(attn:d64p4t4|ffn:e32)", "vllm:d256t4"),
    ],
)
def test_a_thousand_ranks_take_seconds(model: str, train: str, rollout: str) -> None:
    start = time.process_time()
    found = PushScore.of(train, rollout, CONFIGS / model, 8, expert_parallel=True, dtype="fp8")
    assert time.process_time() - start < 10
    received = [int(each.received.max()) for each in found.others]
    assert received == sorted(received)
    assert any(each.engines == found.given.engines for each in found.others)


def test_what_cannot_be_in_fp8_is_refused_before_anything_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written("gpt oss")))
    for arguments, message in (
        ([TRAIN, "vllm:d32t32", "--expert-parallel", *DEEPSEEK],
         "LayoutError: rollout.dtype: fp8: a scale is of 128 x 128 weights, and vllm:d32t32 gives each rank "
         "576 of the 18432 dims inside an MLP, no multiple of 128; write rollout.backend=vllm:d64t16, or "
         "rollout.dtype=bf16\n"),
        (["megatron:d2", "vllm:d2", "--model", str(tmp_path), "--rollout-dtype", "fp8"],
         "ModelError: rollout.dtype: fp8: the experts of gpt_oss are fused"),
    ):  # fmt: skip
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(message) and captured.out == ""
    with pytest.raises(SystemExit, match="2"):
        main(["megatron:d2", "vllm:d2", "--rollout-dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err
