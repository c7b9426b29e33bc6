"""Seeds of completions."""

from hypothesis import given
from hypothesis import strategies as st

from mtrl.rollout.seeds import completion_seed

NUMBERS = st.integers(-(2**70), 2**70)
KEYS = st.fixed_dictionaries(
    {"seed": NUMBERS, "policy_version": NUMBERS, "prompt_id": NUMBERS, "sample_index": NUMBERS}
)


@given(KEYS)
def test_a_seed_fits_63_bits_and_is_a_function_of_its_key(key: dict[str, int]) -> None:
    assert 0 <= completion_seed(**key) < 2**63
    assert completion_seed(**key) == completion_seed(**dict(reversed(key.items())))


@given(KEYS, KEYS)
def test_different_keys_give_different_seeds(one: dict[str, int], other: dict[str, int]) -> None:
    assert (completion_seed(**one) == completion_seed(**other)) == (one == other)


def test_numbers_do_not_run_into_each_other() -> None:
    one = completion_seed(seed=1, policy_version=11, prompt_id=1, sample_index=1)
    assert one != completion_seed(seed=11, policy_version=1, prompt_id=1, sample_index=1)


def test_seeds_stay_what_they_were_in_earlier_runs() -> None:
    # A change here makes resumed runs leave the path of those that were never stopped.
    assert completion_seed(seed=1, policy_version=0, prompt_id=7, sample_index=0) == 5306337112899530577
