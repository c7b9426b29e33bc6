"""The scales of fp8_delayed in checkpoints, over the reference of Transformer Engine: a run resumed under its
layout is the run that never stopped; under another one they begin anew.
"""

from pathlib import Path
from typing import Any

import pytest

from mtrl.models.precision import Fp8
from tests.distributed.checkpoint_runs import newest, open_run, own_tensors, restore, save
from tests.distributed.test_fp8_layouts import SIZES
from tests.distributed.test_te_fp8_parameters import step
from tests.distributed.toy_runs import each_case, load_toy
from tests.distributed.world import World
from tests.toys import build_toy, write_weights

SPEC, OTHER = "megatron:(attn:d2|ffn:e2)", "megatron:t2"
DELAYED = Fp8(recipe="fp8_delayed", gradients="e5m2")


def open_way(groups: Any, path: Path) -> Any:
    model = load_toy(groups, 1, path, precision="bf16", backend="transformer_engine", fp8=DELAYED)
    return open_run(model, distributed=True)


def resumed(groups: Any, out: Path, *, with_scales: bool) -> dict[str, Any]:
    """A run as the checkpoint left it, and what its next step gives."""
    from mtrl.checkpoint.format import RunState
    from mtrl.checkpoint.fp8_scales import restore_scales, scale_tensors

    trainer = open_way(groups, newest(out))
    restore(trainer, out)
    state = RunState.read(newest(out))
    is_restored = with_scales and restore_scales(trainer.model, newest(out), state)
    scales = {name: value.clone() for name, value in scale_tensors(trainer.model).items()}
    return {"restored": is_restored, "scales": scales, "step": step(trainer), "after": own_tensors(trainer)}


def train(folder: str) -> dict[str, Any]:
    """On a rank: two steps, a checkpoint, a third; and the third from the checkpoint, in three ways."""
    from mtrl.checkpoint.fp8_scales import scale_tensors

    out, found = Path(folder) / "out", {}
    for groups, *_ in each_case([[SPEC, 1, "", "run"]]):
        trainer = open_way(groups, Path(folder) / "toy")
        assert not scale_tensors(trainer.model)
        for _ in range(2):
            step(trainer)
        save(trainer, out, Path(folder) / "toy", 2)
        scales = {name: value.clone() for name, value in scale_tensors(trainer.model).items()}
        found["run"] = {"scales": scales, "step": step(trainer), "after": own_tensors(trainer)}
        found["again"] = resumed(groups, out, with_scales=True)
        found["without"] = resumed(groups, out, with_scales=False)
    for groups, *_ in each_case([[OTHER, 1, "", "other"]]):
        found["other"] = resumed(groups, out, with_scales=True)
    return found


@pytest.fixture(scope="module")
def ranks(te_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    write_weights(build_toy("moe", seed=5, **SIZES), folder / "toy")
    return te_world.run(train, {"folder": str(folder)}, size=2, timeout_s=240.0)


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def test_a_run_resumed_with_its_scales_is_the_run_that_never_stopped(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        run, again = rank["run"], rank["again"]
        assert again["restored"] and run["scales"] and same(again["scales"], run["scales"])
        assert again["step"] == run["step"] and same(again["after"], run["after"])


def test_without_them_it_is_another(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert not rank["without"]["scales"]
        assert rank["without"]["step"] != rank["run"]["step"]
        assert rank["without"]["step"] == pytest.approx(rank["run"]["step"], rel=0.1)


def test_under_another_layout_they_begin_anew(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert not rank["other"]["restored"] and not rank["other"]["scales"]
