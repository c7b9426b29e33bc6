"""Parameters kept in FP8 blocks, over the reference of Transformer Engine, under Megatron's DDP and its
distributed optimizer: steps are bit by bit those of bf16 parameters that are quantised for each product,
since masters are rounded to bf16 before they are quantised; checkpoints hold the masters.
"""

from pathlib import Path
from typing import Any

import pytest

from mtrl.models.precision import Fp8
from tests.distributed.checkpoint_runs import digest, newest, own_tensors, restore, save
from tests.distributed.test_fp8_layouts import SIZES, samples
from tests.distributed.toy_runs import each_case, load_toy
from tests.distributed.world import World
from tests.toys import build_toy, write_weights

# With p2 the first stage has no layer in FP8.
SPECS = {"megatron:(attn:d2|ffn:e2)": 2, "megatron:t2": 2, "megatron:p2": 2}
WAYS: dict[str, Fp8] = {
    "products": Fp8(bf16_first_layers=1),
    "parameters": Fp8(bf16_first_layers=1, parameters=True),
}


def open_way(groups: Any, path: Path, way: str) -> Any:
    """A trainer that clips nothing: the norm's summands come in another order in the two ways."""
    from mtrl.config_engines import OptimizerSection
    from mtrl.trainer import Trainer

    model = load_toy(groups, 1, path, precision="bf16", backend="transformer_engine", fp8=WAYS[way])
    trainer = Trainer(model, OptimizerSection(lr=1e-2, eps=1e-2, grad_clip=1e9, distributed=True))
    trainer.start_phase(total_steps=8, lr=1e-2, warmup_steps=2, decay="cosine")
    return trainer


def gather_one_by_one() -> None:
    """Have Megatron gather one buffer after another. It coalesces them, uint8 and bf16 alike, and gloo makes
    one message of that, of one dtype: numbers in FP8 come back rounded. NCCL sends each for itself.
    """
    from contextlib import nullcontext

    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = lambda *args, **kwargs: nullcontext()


def train(folder: str, spec: str) -> dict[str, Any]:
    """On a rank: two steps, a checkpoint and a third in both ways; the third again from the checkpoint."""
    gather_one_by_one()
    found: dict[str, Any] = {}
    toy = Path(folder) / "toy"
    for groups, _, way, _ in each_case([[spec, 1, way, way] for way in WAYS]):
        out = Path(folder) / spec / way
        trainer = open_way(groups, toy, way)
        losses = [step(trainer) for _ in range(2)]
        save(trainer, out, toy, 2)
        before = {key: value.clone() for key, value in own_tensors(trainer).items()}
        losses.append(step(trainer))
        again = open_way(groups, newest(out), way)
        restore(again, out)
        opened = {key: value.clone() for key, value in own_tensors(again).items()}
        repeated = step(again)
        parameters = trainer.model.parameters()
        kinds = [type(parameter).__name__ for parameter in parameters.values()]
        with trainer.model.fp8_parameters.masters_shown():
            masters = trainer.model.tensors()
        found[way] = {
            "losses": losses,
            "repeated": repeated,
            "opened differ": [key for key in before if not before[key].equal(opened[key])],
            "checkpoint": digest(newest(out)),
            "in fp8": kinds.count("Float8BlockwiseQTensor"),
            "rounded": [not masters[key].equal(value) for key, value in trainer.model.tensors().items()],
        }
    return found


def step(trainer: Any) -> list[float]:
    from mtrl.objectives import SftLoss
    from mtrl.policy import make_microbatches

    rows = make_microbatches(samples(), trainer.model, max_tokens=64, pad_token_id=0)
    result = trainer.step(rows, SftLoss())
    return [result.loss, result.grad_norm]


@pytest.fixture(scope="module", params=SPECS)
def run(request: pytest.FixtureRequest, te_world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    write_weights(build_toy("moe", seed=5, **SIZES), folder / "toy")
    arguments = {"folder": str(folder), "spec": request.param}
    return te_world.run(train, arguments, size=SPECS[request.param], timeout_s=240.0)


def test_steps_are_those_of_parameters_in_bf16_bit_by_bit(run: Any) -> None:
    counts = {way: sum(rank[way]["in fp8"] for rank in run) for way in WAYS}
    assert counts["products"] == 0 < counts["parameters"]
    for rank in run:
        kept, quantised = rank["products"], rank["parameters"]
        assert [loss for loss, _ in quantised["losses"]] == [loss for loss, _ in kept["losses"]]
        norms = [[norm for _, norm in each["losses"]] for each in (quantised, kept)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_checkpoints_are_the_same_bit_by_bit_and_hold_masters(run: Any) -> None:
    for rank in run:
        kept, quantised = rank["products"], rank["parameters"]
        assert quantised["checkpoint"] == kept["checkpoint"]
        assert sum(quantised["rounded"]) == quantised["in fp8"] and not any(kept["rounded"])


def test_a_run_resumed_is_the_run_that_never_stopped(run: Any) -> None:
    for rank in run:
        for way in WAYS:
            assert rank[way]["opened differ"] == []
            assert rank[way]["repeated"] == rank[way]["losses"][-1]
