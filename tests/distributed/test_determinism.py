"""The same config, seed and layout repeat bit for bit; what ``deterministic`` turns on where no GPU is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.router_runs import Found, router_section, write_toys
from tests.distributed.toy_runs import batch
from tests.distributed.world import World


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    return folder


def train(folder: str, spec: str, deterministic: bool) -> Found:
    """On a rank: three steps' measures, this rank's weights, and whether torch's switch was on."""
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

    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(spec)))
    parallel_groups.seed_everything(7, groups)
    path = Path(folder) / "glm4 moe"
    model = build_model(load_model_config(path), groups, deterministic_mode=deterministic)
    load_hf(model, path)
    seen = []
    model.chunks[0].register_forward_hook(
        lambda *unused: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    router = router_section("glm4 moe", "microbatch")
    trainer = Trainer(model, OptimizerSection(lr=1e-2), router=router, deterministic=deterministic)
    trainer.start_phase(total_steps=3, lr=1e-2, warmup_steps=0)
    rows = [make_microbatches(batch(n), model, max_tokens=40, pad_token_id=0) for n in range(3)]
    steps = [trainer.step(each, SftLoss()) for each in rows]
    return {
        "metrics": [[s.loss, s.grad_norm, s.num_tokens, s.router.aux_loss, s.router.z_loss] for s in steps],
        "weights": {f"{chunk}/{name}": value for (chunk, name), value in model.tensors().items()},
        "seen": seen,
        "after": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spec", ["megatron:(attn:d2|ffn:e2)", "megatron:(attn:t2|ffn:e2)"])
def test_two_runs_are_the_same_bit_for_bit(world: World, toys: Path, spec: str, deterministic: bool) -> None:
    arguments = {"folder": str(toys), "spec": spec, "deterministic": deterministic}
    first, second = (world.run(train, arguments, size=2) for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        assert mine["metrics"] == other["metrics"]
        assert mine["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(value, other["weights"][key]) for key, value in mine["weights"].items())
    metrics: list[Any] = first[0]["metrics"]
    assert len({step[0] for step in metrics}) == 3, "training changes the loss"


@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_is_deterministic_only_while_the_trainer_computes(
    world: World, toys: Path, deterministic: bool
) -> None:
    arguments = {"folder": str(toys), "spec": "megatron:d1", "deterministic": deterministic}
    found = world.run(train, arguments, size=1)[0]
    assert set(found["seen"]) == {deterministic}
    assert found["after"] is False
