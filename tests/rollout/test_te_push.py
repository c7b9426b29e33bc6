"""Weights kept by the backend of Transformer Engine reach the engine: norms in linears, experts apart, and
parameters in FP8.

Trainers run over the reference of Transformer Engine's modules; see tests/distributed/test_te_backend.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtrl.config_engines import OptimizerSection
from mtrl.models.builder import build_model
from mtrl.models.families import load_model_config
from mtrl.models.gather import TensorGather
from mtrl.models.hf import initialize
from mtrl.models.precision import Fp8
from mtrl.objectives import SftLoss
from mtrl.parallel import groups
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from mtrl.policy import make_microbatches
from mtrl.rl import to_samples
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all
from mtrl.rollout.vllm_engine import VllmEngine
from mtrl.tools.bench.push import MODELS
from mtrl.trainer import Trainer
from mtrl.weight_push.push import WeightPush
from tests.distributed.test_te_fp8_parameters import gather_one_by_one
from tests.distributed.world import ENGINE_PRELOADED, World
from tests.rollout.push_scenarios import Case, run_case
from tests.rollout.test_push import LOGPROB_TOLERANCE
from tests.rollout.toys import toy_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=8, num_samples=2, stop_token_ids=())
CASES = {
    case.name: case
    for case in (
        Case(actor="megatron:(attn:t2|ffn:e2)", rollout="vllm:d2", backend="transformer_engine"),
        Case(
            actor="megatron:(attn:d2|ffn:e2)",
            rollout="vllm:t2",
            toy="deepseek v3",
            backend="transformer_engine",
        ),
    )
}


def pushes(folder: str) -> dict[str, Any]:
    return {name: run_case(case, Path(folder) / str(n)) for n, (name, case) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def te_world() -> Iterator[World]:
    reference = Path(__file__).resolve().parents[1] / "te_reference"
    world = World(preload=ENGINE_PRELOADED, path=(reference,))
    yield world
    world.close()


@pytest.fixture(scope="module")
def pushed(te_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("pushes"))
    results: list[dict[str, Any]] = te_world.run(pushes, {"folder": folder}, size=2, timeout_s=280.0)
    return results


@pytest.mark.parametrize("case", CASES)
def test_the_engine_says_what_the_trainer_and_transformers_say(
    pushed: list[dict[str, Any]], case: str
) -> None:
    for update in pushed[0][case]["updates"]:
        assert update["trainer"] <= LOGPROB_TOLERANCE and update["transformers"] <= LOGPROB_TOLERANCE
        assert update["moved"] > 1e4 * LOGPROB_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_rank_receives_exactly_what_it_lacks(pushed: list[dict[str, Any]], case: str) -> None:
    for rank in pushed:
        assert {each["received"] for each in rank[case]["updates"]} == {rank[case]["lacking_bytes"]}


def pushes_of_parameters_in_fp8(folder: str, actor: str, rollout: str) -> dict[str, Any]:
    """On a rank, two updates: how many parameters are in FP8, which tensors of the engine are not what its
    own loader makes of full tensors, how many each push changed, how far sampler and trainer are apart.
    """
    gather_one_by_one()
    home, spec = Path(folder), parse_rollout_spec(rollout)
    parallel = groups.create(RankLayout.from_spec(parse_training_spec(actor)))
    groups.seed_everything(1, parallel)
    model = build_model(
        load_model_config(home), parallel, precision="bf16", backend="transformer_engine",
        fp8=Fp8(bf16_first_layers=1, parameters=True),
    )  # fmt: skip
    initialize(model, 1)
    trainer = Trainer(model, OptimizerSection(lr=0.02, distributed=True))
    trainer.start_phase(total_steps=2, lr=0.02, warmup_steps=0)
    engine = VllmEngine.create(
        home, spec, max_model_len=64, max_num_seqs=8, dtype="bfloat16", seed=0, kv_cache_bytes=16 << 20
    )
    push = WeightPush(model, engine, torch.bfloat16, num_verified=2)
    wrong, moved, apart = [], [], []
    before = {name: torch.zeros_like(tensor) for name, tensor in engine.destinations.items()}
    for version in (1, 2):
        push.run(policy_version=version)
        pushed = {name: tensor.clone() for name, tensor in engine.destinations.items()}
        moved.append(sum(not tensor.equal(before[name]) for name, tensor in pushed.items()))
        before = pushed
        prompts = toy_prompts(5, 11)
        completions = sample_on_all(engine, prompts, SAMPLING, seed=1)
        batch = make_microbatches(
            to_samples(prompts, completions, [0.0] * len(completions)), model, max_tokens=64, pad_token_id=0
        )
        logprobs = trainer.policy.logprobs(batch)
        apart.append(
            max(
                float((one - each.packed.sampler_logprobs_T)[each.packed.loss_mask_T].abs().max())
                for one, each in zip(logprobs, batch, strict=True)
                if each.packed.loss_mask_T.any()
            )
        )
        names = [tuple(model.weight_map.hf_shapes())] * dist.get_world_size()
        engine.load_weights(TensorGather(model, names).run(torch.bfloat16), policy_version=version)
        wrong += [name for name, tensor in engine.destinations.items() if not tensor.equal(pushed[name])]
        trainer.step(batch, SftLoss())
    engine.shutdown()
    return {"in_fp8": len(push._copies.pairs), "wrong": wrong, "moved": moved, "apart": apart}


@pytest.mark.parametrize(
    ("actor", "rollout"), [("megatron:(attn:d2|ffn:e2)", "vllm:t2"), ("megatron:t2", "vllm:d2")]
)
def test_of_parameters_in_fp8_the_engine_gets_what_the_trainer_multiplies_by(
    te_world: World, tmp_path: Path, actor: str, rollout: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["tiny, 8 experts"]))
    arguments = {"folder": str(tmp_path), "actor": actor, "rollout": rollout}
    for rank in te_world.run(pushes_of_parameters_in_fp8, arguments, size=2, timeout_s=200.0):
        assert rank["in_fp8"] > 0 and rank["wrong"] == []
        assert min(rank["moved"]) > 20
        # Activations in FP8, which the engine's are not.
        assert max(rank["apart"]) < 0.1
