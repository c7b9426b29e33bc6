"""Two microbatches at once, one's tokens on their way to experts while another's are computed, under the
backend of Transformer Engine over the reference: no bit changes, in bf16 or FP8. See test_dispatchers.py.
"""

from pathlib import Path
from typing import Any

import pytest

from mtrl.models.precision import Fp8
from tests.distributed.test_dispatchers import TOY, count_plans, steps_of
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save

FLAT, STAGED = "megatron:(attn:d2|ffn:e2)", "megatron:(attn:p2t2|ffn:e2)"
# Widths that FP8's products take, over two tensor parallel ranks too.
SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
PRECISIONS: dict[str, Fp8 | None] = {
    "bf16": None,
    "fp8_blockwise": Fp8(),
    "fp8_delayed": Fp8(recipe="fp8_delayed", gradients="e5m2"),
    "mxfp8": Fp8(recipe="mxfp8"),
}


def train(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """On a rank: two steps of each precision, without overlap and with it."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config

    found = {}
    for groups, num_chunks, precision, name in each_case(cases):
        for overlap in (False, True):
            model = build_model(
                load_model_config(Path(folder)),
                groups,
                precision="bf16",
                fp8=PRECISIONS[precision],
                backend="transformer_engine",
                num_chunks=num_chunks,
                overlap_moe_expert_parallel_comm=overlap,
            )
            plans = count_plans(model)
            found[f"{name} {overlap}"] = steps_of(model, folder, None) | {"plans": len(plans)}
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "toy"
    save(build_family_toy(TOY, seed=1, **SIZES), folder)
    return folder


@pytest.fixture(scope="module")
def trained(te_world: World, toy: Path) -> dict[str, Any]:
    return run(te_world, toy, FLAT, 1, *PRECISIONS)


def run(world: World, toy: Path, spec: str, num_chunks: int, *precisions: str) -> dict[str, Any]:
    cases = [[spec, num_chunks, precision, precision] for precision in precisions]
    size = 2 if spec == FLAT else 4
    found: list[Any] = world.run(train, {"folder": str(toy), "cases": cases}, size=size, timeout_s=240.0)
    return dict(found[0])


def same_bits(found: Any, expected: Any) -> None:
    assert expected["plans"] == 0 < found["plans"]
    assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    assert all(found["weights"][key].equal(value) for key, value in expected["weights"].items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_overlapping_two_microbatches_changes_no_bit(trained: dict[str, Any], precision: str) -> None:
    same_bits(trained[f"{precision} True"], trained[f"{precision} False"])


def test_each_recipe_computes_something_else_under_overlap(trained: dict[str, Any]) -> None:
    losses = {trained[f"{precision} True"]["loss"][1] for precision in PRECISIONS}
    assert len(losses) == len(PRECISIONS)


@pytest.mark.slow
@pytest.mark.one_stack
def test_nor_does_it_over_stages_of_several_chunks(te_world: World, toy: Path) -> None:
    found = run(te_world, toy, STAGED, 2, "bf16", "fp8_blockwise")
    for precision in ("bf16", "fp8_blockwise"):
        same_bits(found[f"{precision} True"], found[f"{precision} False"])
