"""Laws of sampling and of refusing, on one rank of the real vLLM."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def life(scenario: Callable[[str, int], list[Any]]) -> dict[str, Any]:
    (result,) = scenario("life_of_an_engine", 1)
    return dict(result)


def test_completions_of_a_group_differ(life: dict[str, Any]) -> None:
    for prompt_id in {prompt_id for prompt_id, *_ in life["first"]}:
        group = [tuple(tokens) for each, _, tokens, _ in life["first"] if each == prompt_id]
        assert len(set(group)) == len(group) > 1


def test_a_run_repeats_exactly(life: dict[str, Any]) -> None:
    assert life["first"] == life["again"]


def test_another_seed_gives_other_completions(life: dict[str, Any]) -> None:
    assert all(one[2] != other[2] for one, other in zip(life["first"], life["other seed"], strict=True))


def test_a_completion_does_not_depend_on_what_is_sampled_with_it(life: dict[str, Any]) -> None:
    together = [tokens for prompt_id, _, tokens, _ in life["first"] if prompt_id == 1]
    assert together == [tokens for _, _, tokens, _ in life["share"]]


def test_many_seeded_prompts_can_be_prefilled_together(life: dict[str, Any]) -> None:
    assert life["crowd"] == 40


def test_the_trainers_random_states_stay_as_they_were(life: dict[str, Any]) -> None:
    assert life["states kept by create"] and life["states kept by generate"]


def test_the_trainers_torch_stays_as_it_was(life: dict[str, Any]) -> None:
    assert life["torch is the trainer's"]


def test_nothing_is_compiled(life: dict[str, Any]) -> None:
    assert life["compiled"] == 0


def test_the_first_generate_waits_for_nothing(life: dict[str, Any]) -> None:
    # CPU seconds, which a busy machine does not stretch. Measured 0.1; compiling takes 2 or more.
    assert life["first_generate_cpu_s"] < 1.0


def test_the_engine_starts_in_five_seconds(life: dict[str, Any]) -> None:
    # Building the toy (0.1 s) and importing vLLM (3 s of it) are in here.
    assert life["start_cpu_s"] < 8.0


def test_greedy_takes_the_most_probable_token(life: dict[str, Any]) -> None:
    assert life["greedy"] == life["greedy of transformers"]


def test_logprobs_are_those_after_the_temperature(life: dict[str, Any]) -> None:
    assert life["cool difference"] < 5e-6


def test_logprobs_are_those_after_top_p(life: dict[str, Any]) -> None:
    assert max(life["nucleus"]) < 5e-6


def test_a_stop_token_ends_a_completion_and_stays_in_it(life: dict[str, Any]) -> None:
    stop, without, tokens, reason, reason_without = life["stop"]
    assert tokens == without[: without.index(stop) + 1]
    assert (reason, reason_without) == ("stop", "length")


def test_text_is_the_tokenizers(life: dict[str, Any]) -> None:
    for (_, _, tokens, _), (text, _) in zip(life["first"], life["texts"], strict=True):
        assert text == "".join(chr(0x4E00 + token) for token in tokens)


def test_without_weights_the_engine_refuses(life: dict[str, Any]) -> None:
    for refusal in (
        *life["no weights"],
        life["bad first loads"]["generate"],
        life["bad later loads"]["generate"],
    ):
        assert refusal.startswith("RolloutError: the engine holds no weights")


def test_good_weights_make_good_after_bad_ones(life: dict[str, Any]) -> None:
    assert life["bad later loads"]["good at last"] == "9"


@pytest.mark.parametrize("when", ["bad first loads", "bad later loads"])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("unknown", "mlp.extra"),
        ("no such expert", "experts.8"),
        ("silently ignored by vLLM", "q_proj.bias"),
        ("doubled", "experts.7.down_proj"),
    ],
)
def test_a_weight_without_a_place_is_named(life: dict[str, Any], when: str, case: str, name: str) -> None:
    assert life[when][case].startswith("WeightError") and name in life[when][case]


@pytest.mark.parametrize("when", ["bad first loads", "bad later loads"])
@pytest.mark.parametrize("case", ["missing", "misshapen"])
def test_incomplete_weights_are_refused(life: dict[str, Any], when: str, case: str) -> None:
    assert life[when][case].startswith("WeightError")


@pytest.mark.parametrize(
    ("case", "says"),
    [("too long", "395 tokens"), ("empty", "0 tokens"), ("alien", "outside 0..249"), ("doubled id", "twice")],
)
def test_requests_that_cannot_be_served_are_refused(life: dict[str, Any], case: str, says: str) -> None:
    assert (
        life["refused requests"][case].startswith("RolloutError") and says in life["refused requests"][case]
    )
