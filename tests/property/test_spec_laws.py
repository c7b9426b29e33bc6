"""Laws of the allocation string."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.parallel.errors import SpecError
from mtrl.parallel.spec import ParallelSpec, RolloutSpec, parse_rollout_spec, parse_spec, parse_training_spec
from tests.property.strategies import legal_training_specs, near_spec_texts, rollout_specs, training_specs


@given(training_specs() | rollout_specs())
def test_parse_of_str_is_the_identity(spec: ParallelSpec | RolloutSpec) -> None:
    assert parse_spec(str(spec)) == spec


def test_parse_of_str_is_the_identity_for_every_legal_spec_up_to_24_ranks() -> None:
    texts = set()
    for spec in legal_training_specs(24):
        assert parse_training_spec(str(spec)) == spec
        texts.add(str(spec))
    assert len(texts) == sum(1 for _ in legal_training_specs(24))  # canonical: one string per spec


@given(training_specs(), st.randoms(use_true_random=False))
def test_a_hybrid_string_means_the_same_in_any_order_and_with_any_blanks(spec: ParallelSpec, random) -> None:
    attn = [f"d{spec.attn.dp}", f"p{spec.attn.pp}", f"t{spec.attn.tp}", f"c{spec.attn.cp}"]
    ffn = [f"d{spec.ffn.edp}", f"p{spec.ffn.pp}", f"t{spec.ffn.etp}", f"e{spec.ffn.ep}"]
    random.shuffle(attn)
    random.shuffle(ffn)
    tokens = ["megatron", ":", "(", "attn", ":", *attn, "|", "ffn", ":", *ffn, ")"]
    parsed = parse_training_spec("".join(token + random.choice(["", " ", "  "]) for token in tokens))
    assert (parsed.attn, parsed.ffn) == (spec.attn, spec.ffn)


@given(near_spec_texts() | st.text(max_size=30))
@settings(max_examples=500)
def test_any_text_parses_or_gives_an_error_with_a_caret_inside_it(text: str) -> None:
    try:
        spec = parse_spec(text)
    except SpecError as error:
        assert error.reason and 0 <= error.column <= len(text)
        assert len(str(error).splitlines()) >= 3
    else:
        assert parse_spec(str(spec)) == spec


@given(training_specs(max_world_size=64), st.integers(2, 9))
def test_the_nearest_legal_sizes_an_error_offers_are_legal(spec: ParallelSpec, ep: int) -> None:
    head = f"d{spec.attn.dp}p{spec.attn.pp}t{spec.attn.tp}c{spec.attn.cp}"
    try:
        parse_spec(f"megatron:{head}e{ep}")
    except SpecError as error:
        offers = error.reason.partition("nearest legal: ")[2].replace(", or ", " or ").split(" or ")
        assert offers
        for offer in offers:
            sizes = {"d": spec.attn.dp, "e": ep} | {offer[0]: int(offer[1:])}
            tail = f"p{spec.attn.pp}t{spec.attn.tp}c{spec.attn.cp}"
            assert parse_spec(f"megatron:d{sizes['d']}{tail}e{sizes['e']}")


@given(rollout_specs())
def test_a_rollout_is_its_three_axes(spec: RolloutSpec) -> None:
    parsed = parse_rollout_spec(f"{spec.backend}:p{spec.pp}d{spec.dp}t{spec.tp}")
    assert (parsed.dp, parsed.tp, parsed.pp) == (spec.dp, spec.tp, spec.pp)
    assert parsed.world_size == spec.dp * spec.tp * spec.pp
