"""``actor.sequence_parallel`` changes where activations lie, not what is computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtrl.batch import Sample
from mtrl.config_engines import OptimizerSection
from mtrl.models.builder import build_model
from mtrl.models.families import load_model_config
from mtrl.models.hf import initialize
from mtrl.objectives import SftLoss
from mtrl.parallel import groups
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from mtrl.policy import make_microbatches
from mtrl.trainer import Trainer
from tests.distributed.world import World
from tests.toys import SMALL

DENSE = SMALL | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "initializer_range": 0.1}


def train(folder: str) -> list[dict[str, Any]]:
    """Three steps with sequence parallelism, and three without."""
    return [_train(Path(folder), sequence_parallel) for sequence_parallel in (True, False)]


def _train(folder: Path, sequence_parallel: bool) -> dict[str, Any]:
    parallel = groups.create(RankLayout.from_spec(parse_training_spec("megatron:t2")))
    groups.seed_everything(1, parallel)
    model = build_model(load_model_config(folder), parallel, sequence_parallel=sequence_parallel)
    initialize(model, seed=2)
    trainer = Trainer(model, OptimizerSection(lr=0.01))
    trainer.start_phase(total_steps=3, lr=0.01, warmup_steps=0)
    samples = [
        Sample(sample_id=n, tokens=tuple(range(n, n + 9)), loss_mask=(False,) + (True,) * 8) for n in range(5)
    ]
    batch = make_microbatches(samples, model, max_tokens=20, pad_token_id=0)
    results = [trainer.step(batch, SftLoss()) for _ in range(3)]
    groups.destroy()
    return {"losses": [each.loss for each in results], "grad_norms": [each.grad_norm for each in results]}


def test_training_without_sequence_parallelism_is_the_same_training(world: World, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    for on, off in world.run(train, {"folder": str(tmp_path)}, size=2):
        # fp32 sums in another order; a gradient that is not reduced differs in the second digit.
        assert on["losses"] == pytest.approx(off["losses"], rel=1e-5)
        assert on["grad_norms"] == pytest.approx(off["grad_norms"], rel=1e-4)
        assert on["losses"][2] < on["losses"][0] - 0.1
