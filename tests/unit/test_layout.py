"""Rank lists of known layouts, written out; the laws are in tests/property."""

import doctest

import pytest

from mtrl.parallel import layout as layout_module
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankCoordinates, RankLayout, RolloutLayout, check_world_size
from mtrl.parallel.spec import parse_rollout_spec, parse_spec, parse_training_spec


def layout_of(text: str) -> RankLayout:
    return RankLayout.from_spec(parse_training_spec(text))


def test_a_folded_layout_written_out() -> None:
    layout = layout_of("megatron:(attn:d2t2p2|ffn:t1e4p2)")
    assert layout.world_size == 8
    assert layout.groups("attn.tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("attn.dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("attn.pp") == layout.groups("ffn.pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("attn.cp") == layout.groups("ffn.etp") == tuple((rank,) for rank in range(8))
    assert layout.groups("ffn.ep") == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_the_order_is_tp_cp_dp_pp_and_etp_ep_edp_pp() -> None:
    layout = layout_of("megatron:(attn:d2t2c2p2|ffn:t2e2)")
    assert layout.coordinates(0b0001) == RankCoordinates(tp=1, cp=0, dp=0, pp=0, etp=1, ep=0, edp=0)
    assert layout.coordinates(0b0010) == RankCoordinates(tp=0, cp=1, dp=0, pp=0, etp=0, ep=1, edp=0)
    assert layout.coordinates(0b0100) == RankCoordinates(tp=0, cp=0, dp=1, pp=0, etp=0, ep=0, edp=1)
    assert layout.coordinates(0b1000) == RankCoordinates(tp=0, cp=0, dp=0, pp=1, etp=0, ep=0, edp=0)


def test_pipeline_is_outermost_where_folding_is_uneven() -> None:
    # cp*tp = 4 and ep*etp = 2 in each stage: the case in which ordering by position alone goes wrong.
    layout = layout_of("megatron:(attn:d1t2c2p2|ffn:e2)")
    assert layout.groups("attn.pp") == layout.groups("ffn.pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("ffn.edp") == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_joint_groups_lie_on_one_side() -> None:
    layout = layout_of("megatron:d2t2p2")
    assert layout.product_groups("attn.tp", "attn.pp") == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert layout.product_groups("attn.pp", "attn.tp") == layout.product_groups("attn.tp", "attn.pp")
    assert layout.product_groups("ffn.edp", "ffn.pp") == ((0, 1, 2, 3, 4, 5, 6, 7),)
    with pytest.raises(ValueError, match="one side"):
        layout.product_groups("attn.tp", "ffn.ep")


@pytest.mark.parametrize("rank", [-1, 8])
def test_coordinates_of_a_rank_outside_the_world_are_an_error(rank: int) -> None:
    with pytest.raises(ValueError, match="not in a world of 8"):
        layout_of("megatron:d8").coordinates(rank)


def test_rollout_engines_are_runs_of_consecutive_ranks() -> None:
    layout = RolloutLayout.from_spec(parse_rollout_spec("vllm:d2t2p2"))
    assert layout.product_groups("rollout.tp", "rollout.pp") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.groups("rollout.tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("rollout.pp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("rollout.dp") == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize("text", ["megatron:d2t2", "vllm:d2t2", "megatron:(attn:d2t2|ffn:t2e2)"])
def test_a_world_of_the_right_size_passes(text: str) -> None:
    check_world_size(parse_spec(text), 4)


@pytest.mark.parametrize(
    ("text", "world_size", "message"),
    [
        (
            "megatron:d4t2",
            4,
            "megatron:d4t2 needs d4*p1*t2*c1 = 8 ranks, but torchrun started 4 (WORLD_SIZE=4); "
            "start it with --nproc-per-node 8 or write megatron:d2t2",
        ),
        (
            "megatron:(attn:d4p2t2c2|ffn:t4e2)",
            16,
            "--nnodes 4 --nproc-per-node 8 or write megatron:(attn:d2p2t2c2|ffn:",
        ),
        ("megatron:t2e2", 3, "start it with --nproc-per-node 2"),
        ("megatron:t2e2", 6, "--nproc-per-node 2 or write megatron:d3t2e2"),
        ("vllm:t2", 8, "vllm:t2 needs d1*t2*p1 = 2 ranks, but torchrun started 8"),
        ("vllm:t2", 8, "or write vllm:d4t2"),
        ("megatron:d12", 8, "--nnodes 2 --nproc-per-node 6"),
    ],
)
def test_a_world_of_another_size_gets_the_numbers_and_the_fix(
    text: str, world_size: int, message: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        check_world_size(parse_spec(text), world_size)
    assert message in str(caught.value)


def test_no_spec_is_offered_where_no_d_fits() -> None:
    for text, world_size in [("megatron:t2", 3), ("megatron:(attn:d4|ffn:t2e2)", 6), ("vllm:t4", 2)]:
        with pytest.raises(LayoutError) as caught:
            check_world_size(parse_spec(text), world_size)
        assert "or write" not in str(caught.value)


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(layout_module)
    assert result.attempted >= 6 and result.failed == 0
