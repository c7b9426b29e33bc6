import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import ConfigError
from mtrl.rewards import load_reward
from mtrl.rewards.functions import last_number

USER_REWARDS = """
import numpy
def length(prompt, completion): return len(completion.text)
def numpy_float(prompt, completion): return numpy.float32(0.5)
def text(prompt, completion): return "1.0"
def nothing(prompt, completion): return None
def nan(prompt, completion): return float("nan")
def infinite(prompt, completion): return float("inf")
number = 3
"""


def prompt(answer: str, prompt_id: int = 0) -> Prompt:
    return Prompt(prompt_id=prompt_id, tokens=(1,), text="?", answer=answer)


def completion(text: str, prompt_id: int = 0, sample_index: int = 0, policy_version: int = 0) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        sample_index=sample_index,
        tokens=(1,),
        logprobs=(0.0,),
        finish_reason="stop",
        policy_version=policy_version,
        text=text,
    )


def score(name: str, answer: str, text: str) -> float:
    (value,) = load_reward(name, seed=0)([prompt(answer)], [completion(text)])
    return value


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards_for_test.py").write_text(USER_REWARDS)
    (tmp_path / "broken_rewards_for_test.py").write_text("import no_such_package_xyz\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards_for_test", raising=False)
    return "my_rewards_for_test"


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [("95", "95", 1.0), ("95", " 95\n", 1.0), ("a b", "a\t b", 1.0), ("95", "9 5", 0.0), ("95", "095", 0.0)],
)
def test_exact_match_differs_by_white_space_alone(answer: str, text: str, expected: float) -> None:
    assert score("exact_match", answer, text) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 37+58 = 95.", "95"),
        ("#### 1,234,567.50", "1234567.5"),
        ("it fell to -4", "-4"),
        ("10-3", "3"),
        ("x-3", "3"),
        ("f(2)-3", "3"),
        ("= -3", "-3"),
        ("1,2", "2"),
        ("$1,000 or 12,34", "34"),
        (".5", "0.5"),
        ("007", "7"),
        ("none", None),
    ],
)
def test_the_last_number_is_what_a_reader_takes_it_for(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@given(
    number=st.decimals(allow_nan=False, allow_infinity=False, places=3),
    words=st.sampled_from(["", "so ", "is: "]),
)
def test_a_number_is_found_however_it_is_grouped(number: Decimal, words: str) -> None:
    assert last_number(f"{words}{number:f}") == number
    assert last_number(f"{words}{number:,f} apples.") == number


def test_numeric_match_compares_the_last_numbers() -> None:
    assert score("numeric_match", "#### 1,234", "That makes 1234.0 dollars.") == 1.0
    assert score("numeric_match", "95", "95 or 96") == 0.0
    assert score("numeric_match", "95", "no idea") == 0.0


def test_numeric_match_with_an_answer_without_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'yes' of prompt 0 holds no number; use exact_match"):
        score("numeric_match", "yes", "1")


def test_rewards_come_in_the_order_of_the_completions() -> None:
    prompts = [prompt("1", prompt_id=5), prompt("2", prompt_id=9)]
    completions = [
        completion(text, prompt_id) for prompt_id, text in [(9, "2"), (5, "2"), (5, "1"), (9, "1")]
    ]
    assert load_reward("exact_match", seed=0)(prompts, completions) == [1.0, 0.0, 1.0, 0.0]


def batch(policy_version: int = 0, size: int = 64) -> tuple[list[Prompt], list[Completion]]:
    prompts = [prompt(str(index), index) for index in range(size)]
    texts = [str(index) if index % 4 == 0 else "wrong" for index in range(size)]
    return prompts, [
        completion(text, index, policy_version=policy_version) for index, text in enumerate(texts)
    ]


@given(seed=st.integers(), version=st.integers(0, 1000), size=st.integers(0, 70))
def test_shuffled_rewards_are_a_permutation_and_repeat(seed: int, version: int, size: int) -> None:
    true = load_reward("exact_match", seed=seed)(*batch(version, size))
    shuffled = load_reward("shuffled:exact_match", seed=seed)(*batch(version, size))
    assert Counter(shuffled) == Counter(true)
    assert shuffled == load_reward("shuffled:exact_match", seed=seed)(*batch(version, size))


def test_shuffled_rewards_tell_nothing_and_differ_by_step() -> None:
    reward = load_reward("shuffled:exact_match", seed=1)
    orders = [tuple(reward(*batch(version))) for version in range(100)]
    assert len(set(orders)) == 100
    # A quarter of all is right, and so must be a quarter of what is given to the right ones: 1600 draws, so
    # the standard deviation is 0.011 and 0.05 more than four of them.
    given_to_right = sum(order[index] for order in orders for index in range(0, 64, 4)) / 1600
    assert abs(given_to_right - 0.25) < 0.05


def test_a_function_of_the_user_is_called_with_prompt_and_completion(user_module: str) -> None:
    assert score(f"{user_module}:length", "1", "12345") == 5.0
    assert score(f"{user_module}:numpy_float", "1", "1") == 0.5
    assert score(f"shuffled:{user_module}:length", "1", "12345") == 5.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("text", r"is '1.0' \(str\); return a float"),
        ("nothing", r"is None \(NoneType\); return a float"),
        ("nan", r"is nan; return a finite number"),
        ("infinite", r"is inf; return a finite number"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_refused_with_its_completion(
    user_module: str, function: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"reward {user_module}:{function} of prompt 0, sample 0 {reason}"):
        score(f"{user_module}:{function}", "1", "1")


def test_a_reward_that_cannot_be_found_is_refused_with_what_there_is(user_module: str) -> None:
    refusals = {
        "exact": r"no reward 'exact'; there are exact_match, numeric_match, shuffled:<name>",
        "shuffled:exact": r"no reward 'exact'",
        "no_such_module_xyz:f": r"cannot import 'no_such_module_xyz'.*PYTHONPATH=\.",
        "broken_rewards_for_test:f": r"No module named 'no_such_package_xyz'",
        ":f": r"cannot import ''",
        f"{user_module}:lenght": r"has no function 'lenght'; it has length",
        f"{user_module}:number": r"has no function 'number'",
    }
    for name, reason in refusals.items():
        with pytest.raises(ConfigError, match=reason):
            load_reward(name, seed=0)
