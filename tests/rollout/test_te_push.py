"""Weights kept by the backend of Transformer Engine reach the engine: norms in linears, experts apart.

Trainers run over the reference of Transformer Engine's modules; see tests/distributed/test_te_backend.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.world import ENGINE_PRELOADED, World
from tests.rollout.push_scenarios import Case, run_case
from tests.rollout.test_push import LOGPROB_TOLERANCE

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

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
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    reference = Path(__file__).resolve().parents[1] / "te_reference"
    world = World(preload=ENGINE_PRELOADED, path=(reference,))
    yield world.run(pushes, {"folder": str(tmp_path_factory.mktemp("pushes"))}, size=2, timeout_s=280.0)
    world.close()


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
