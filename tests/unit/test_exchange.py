"""Completions to numbers and back; tests/distributed/test_exchange.py has them travel."""

from hypothesis import given
from hypothesis import strategies as st

from mtrl.batch import Completion
from mtrl.exchange import decode, encode

_floats = st.floats(width=32, max_value=0.0, allow_nan=False, allow_infinity=False)
_completions = st.builds(
    lambda prompt_id, sample_index, version, reason, drawn, text: Completion(
        prompt_id=prompt_id,
        sample_index=sample_index,
        tokens=tuple(token for token, _ in drawn),
        logprobs=tuple(logprob for _, logprob in drawn),
        finish_reason=reason,
        policy_version=version,
        text=text,
    ),
    prompt_id=st.integers(0, 2**40),
    sample_index=st.integers(0, 99),
    version=st.integers(0, 2**40),
    reason=st.sampled_from(["stop", "length"]),
    drawn=st.lists(st.tuples(st.integers(0, 2**31), _floats), max_size=5),
    text=st.text(max_size=8),
)


@given(st.lists(_completions, max_size=4))
def test_decoding_what_was_encoded_is_the_identity(completions: list[Completion]) -> None:
    integers, logprobs = encode(completions)
    assert decode(integers.tolist(), logprobs.tolist()) == completions
