"""The allocation string: every rule of the grammar, and where the caret of every error stands."""

import copy
import subprocess
import sys

import pytest

from mtrl.parallel.errors import MtrlError, SpecError
from mtrl.parallel.spec import (
    MAX_WORLD_SIZE,
    AttnAxes,
    FfnAxes,
    ParallelSpec,
    RolloutSpec,
    parse_rollout_spec,
    parse_spec,
    parse_training_spec,
    refuse_unsupported,
)

FOLDED = "megatron:(attn:d4p2t2c2|ffn:d2p2t4e2)"


def sizes(text: str) -> tuple[int, ...]:
    """(dp, pp, tp, cp, ep, etp, edp, world)."""
    spec = parse_training_spec(text)
    attn, ffn = spec.attn, spec.ffn
    assert ffn.pp == attn.pp
    return (attn.dp, attn.pp, attn.tp, attn.cp, ffn.ep, ffn.etp, ffn.edp, spec.world_size)


def error_at(text: str) -> tuple[str, str]:
    """The reason, and the rest of the string from the caret on."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert 0 <= caught.value.column <= len(text)
    return caught.value.reason, text[caught.value.column :]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("megatron:(attn:d4p2t2c2|ffn:d2p2t4e2)", (4, 2, 2, 2, 2, 4, 2, 32)),
        ("megatron:(attn:d1p12t4|ffn:d1p12e4)", (1, 12, 4, 1, 4, 1, 1, 48)),
        ("megatron:(attn:d4p2t2c2|ffn:t4e2)", (4, 2, 2, 2, 2, 4, 2, 32)),
        ("megatron:(attn:t8|ffn:t1e8)", (1, 1, 8, 1, 8, 1, 1, 8)),
        ("megatron:attn:d4p2t2c2|ffn:d2p2t4e2", (4, 2, 2, 2, 2, 4, 2, 32)),
        ("megatron:d2p2t4e4", (2, 2, 4, 1, 4, 1, 2, 16)),
        ("megatron:t2", (1, 1, 2, 1, 1, 1, 2, 2)),
        ("megatron[actor]:(attn:d4t2|ffn:e8)", (4, 1, 2, 1, 8, 1, 1, 8)),
    ],
)
def test_a_training_string_gives_these_axes(text: str, expected: tuple[int, ...]) -> None:
    assert sizes(text) == expected


def test_a_rollout_string_gives_its_axes() -> None:
    spec = parse_rollout_spec("vllm:d2t4p2")
    assert (spec.dp, spec.tp, spec.pp, spec.world_size) == (2, 4, 2, 16)


def test_r1_an_omitted_axis_is_one_and_order_is_free() -> None:
    assert parse_spec("megatron:c2t4d3") == parse_spec("megatron:d3p1t4c2e1")
    assert parse_spec("megatron:(attn:t2d4|ffn:e2d4)") == parse_spec("megatron:(attn:d4p1t2c1|ffn:d4p1t1e2)")
    assert parse_spec("vllm:t2") == RolloutSpec(backend="vllm", dp=1, tp=2, pp=1)


def test_r2_experts_add_no_ranks() -> None:
    assert parse_spec("megatron:d8").world_size == parse_spec("megatron:d8e4").world_size == 8
    assert parse_spec("megatron:d2t3p5c7").world_size == 2 * 3 * 5 * 7


@pytest.mark.parametrize("text", ["megatron:t8", "megatron:t8e2", "megatron:d2t4c2e16", "fsdp:t4"])
def test_r3_a_plain_string_never_splits_an_expert(text: str) -> None:
    assert parse_training_spec(text).ffn.etp == 1


def test_r4_a_plain_string_derives_edp_from_the_world() -> None:
    assert parse_training_spec("megatron:d4t2c2p3").ffn.edp == 16  # also when e is 1
    assert parse_training_spec("megatron:d4t2c2p3e8").ffn.edp == 2


@pytest.mark.parametrize(
    ("text", "reason", "rest"),
    [
        ("megatron:d2e4", "d2*p1*t1*c1 = 2 is not divisible by p1*e4 = 4; nearest legal: e2, or d4", "e4"),
        (
            "megatron:d3p2e2",
            "d3*p2*t1*c1 = 6 is not divisible by p2*e2 = 4; nearest legal: e1 or e3, or d2 or d4",
            "e2",
        ),
        ("megatron:e6t4d2", "= 8 is not divisible by p1*e6 = 6; nearest legal: e4 or e8, or d3", "e6t4d2"),
    ],
)
def test_r4_experts_that_do_not_divide_get_the_equation_and_the_nearest_sizes(
    text: str, reason: str, rest: str
) -> None:
    found, found_rest = error_at(text)
    assert reason in found and found_rest == rest


def test_r5_a_hybrid_string_sets_both_sides() -> None:
    spec = parse_training_spec("megatron:(attn:d4t2|ffn:d2t2e2)")
    assert spec.attn == AttnAxes(dp=4, tp=2)
    assert spec.ffn == FfnAxes(edp=2, etp=2, ep=2)
    assert parse_training_spec("megatron:(attn:t4|ffn:d4)").ffn == FfnAxes(edp=4, etp=1, ep=1)


def test_r6_ffn_shares_the_pipeline_of_attn() -> None:
    assert parse_spec("megatron:(attn:d2p3|ffn:e2)") == parse_spec("megatron:(attn:d2p3|ffn:p3e2)")
    reason, rest = error_at("megatron:(attn:d2p2t1c4|ffn:d2p4t1e2)")
    assert "p2" in reason and "p4" in reason and rest == "p4t1e2)"
    reason, rest = error_at("megatron:(attn:d2p2|ffn:p1e2)")  # a given p1 is not an omitted p
    assert "p2" in reason and "p1" in reason and rest == "p1e2)"


def test_r7_ffn_d_is_derived_or_must_agree() -> None:
    assert parse_training_spec("megatron:(attn:d4p2t2c2|ffn:t4e2)").ffn.edp == 2
    reason, rest = error_at("megatron:(attn:d4p2t2c2|ffn:d4p2t4e2)")
    assert "d4*p2*t2*c2 = 32" in reason and "d4*p2*t4*e2 = 64" in reason and "write d2 in ffn" in reason
    assert rest == "d4p2t4e2)"


@pytest.mark.parametrize(
    ("text", "reason", "rest"),
    [
        (
            "megatron:(attn:d4p2t2c2|ffn:e3)",
            "the world d4*p2*t2*c2 = 32 is not divisible by p2*t1*e3 = 6; "
            "nearest legal: e2 or e4, or attn d3 or attn d6",
            "e3)",
        ),
        ("megatron:(attn:d4|ffn:t3)", "p1*t3*e1 = 3; nearest legal: t2 or t4, or attn d3 or attn d6", "t3)"),
        ("megatron:(attn:d3t5|ffn:t2e7)", "p1*t2*e7 = 14; nearest legal: attn d14", "e7)"),
        ("megatron:(attn:d4|ffn:d1e3)", "e2 or e4, or attn d3 or attn d6 (and leave ffn's d out)", "e3)"),
    ],
)
def test_r7_a_hybrid_that_does_not_divide_gets_the_equation_and_the_nearest_sizes(
    text: str, reason: str, rest: str
) -> None:
    found, found_rest = error_at(text)
    assert reason in found and found_rest == rest


def test_r8_each_side_has_its_own_axes() -> None:
    assert error_at("megatron:(attn:d4p2t2c2|ffn:d2p2t4c2e2)") == (
        "ffn has no axis 'c'; its axes are d, p, t, e; context parallelism folds into ffn's d",
        "c2e2)",
    )
    assert error_at("megatron:(attn:d4p2t2e2|ffn:d2p2t4e2)") == (
        "attn has no axis 'e'; its axes are d, p, t, c",
        "e2|ffn:d2p2t4e2)",
    )


@pytest.mark.parametrize(
    ("text", "reason", "rest"),
    [
        ("megatron:(attn:d4p2t2c2)", "ffn is missing", ")"),
        ("megatron:attn:d4p2t2c2", "ffn is missing", ""),
        ("megatron:(ffn:e4|attn:d4)", "attn comes first", "ffn:e4|attn:d4)"),
        ("megatron:ffn:e4", "attn comes first", "ffn:e4"),
        ("megatron:(attn:|ffn:e4)", "attn is empty", "|ffn:e4)"),
        ("megatron:(attn:d4|ffn:)", "ffn is empty", ")"),
        ("megatron:(attn:d4|)", "'ffn:' was expected, but found ')'", ")"),
        ("megatron:(attn d4|ffn:e4)", "':' was expected after attn", "d4|ffn:e4)"),
        ("megatron:(moe:d4|ffn:e4)", "'attn:' was expected", "moe:d4|ffn:e4)"),
        ("megatron:(d4t2)", "'attn:' was expected", "d4t2)"),
        ("megatron:d4|ffn:e4", "a plain string has no '|'", "|ffn:e4"),
    ],
)
def test_r9_attn_then_ffn_both_there_and_not_empty(text: str, reason: str, rest: str) -> None:
    found, found_rest = error_at(text)
    assert reason in found and found_rest == rest


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("d4t2", "no backend; write megatron:d4t2 (or vllm:d4t2 to sample)"),
        ("d4e2", "no backend; write megatron:d4e2"),
        ("(attn:d4|ffn:e4)", "no backend; write megatron:(attn:d4|ffn:e4)"),
        ("attn:d4|ffn:e4", "no backend; write megatron:attn:d4|ffn:e4"),
        (
            "megatorn:d4",
            "unknown backend 'megatorn'; there are megatron, fsdp, archon, vllm, sglang; did you mean",
        ),
        ("Megatron:d4", "did you mean megatron?"),
        ("", "the spec is empty"),
        ("  ", "the spec is empty"),
        (":d4", "a backend was expected"),
    ],
)
def test_r10_the_backend_is_mandatory(text: str, advice: str) -> None:
    reason, rest = error_at(text)
    assert advice in reason and rest.strip() == text.strip()


def test_r11_virtual_stages_are_not_in_the_string() -> None:
    reason, rest = error_at("megatron:d4p2v2")
    assert "actor.virtual_pipeline_size" in reason and rest == "v2"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("vllm:d4+megatron:d4", "+megatron:d4"),
        ("megatron:d4+vllm:d4", "+vllm:d4"),
        ("vllm:d4|megatron:d4", "|megatron:d4"),
        ("megatron:d4|vllm:d4", "|vllm:d4"),
    ],
)
def test_r12_a_whole_job_gets_the_fields_of_each_engine(text: str, rest: str) -> None:
    reason, found_rest = error_at(text)
    assert 'rollout.backend: "vllm:d4" and actor.backend: "megatron:d4"' in reason
    assert found_rest == rest


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("fsdp:d8", "megatron:d8"),
        ("fsdp[ref]:d4e2", "megatron[ref]:d4e2"),
        ("archon:(attn:d4t2|ffn:t2e4)", "megatron:(attn:d4t2|ffn:t2e4)"),
        ("sglang:d2t4", "vllm:d2t4"),
    ],
)
def test_r13_a_known_backend_parses_and_is_refused_with_what_to_write(text: str, instead: str) -> None:
    spec = parse_spec(text)
    with pytest.raises(SpecError, match=r"does not run") as caught:
        refuse_unsupported(spec)
    assert caught.value.reason.endswith(f"write {instead}")
    refuse_unsupported(parse_spec(instead))


def test_r13_fsdp_has_no_hybrid_string() -> None:
    reason, rest = error_at("fsdp:(attn:d4|ffn:e4)")
    assert "no hybrid" in reason and rest == "(attn:d4|ffn:e4)"


def test_r14_engine_expert_parallelism_is_a_config_field() -> None:
    reason, rest = error_at("vllm:d4e2")
    assert reason.startswith("a rollout has no axis 'e'; its axes are d, t, p")
    assert "rollout.expert_parallel" in reason and rest == "e2"


@pytest.mark.parametrize(
    ("text", "reason", "rest"),
    [
        ("megatron:d0", "a whole number from 1", "0"),
        ("megatron:d04", "write d4", "04"),
        ("megatron:d", "axis 'd' needs a size", ""),
        ("megatron:dt2", "axis 'd' needs a size", "t2"),
        ("megatron:d-1", "axis 'd' needs a size", "-1"),
        ("megatron:d²", "axis 'd' needs a size", "²"),
        ("megatron:d٣", "axis 'd' needs a size", "٣"),
        ("megatron:D4", "no axis 'D'; its axes are d, p, t, c, e; write d", "D4"),
        ("megatron:x4", "no axis 'x'", "x4"),
        ("megatron:d1 2", "no axis '2'", "2"),
        ("megatron.d4", "':' was expected after megatron, but found '.'", ".d4"),
        ("megatron", "':' was expected after megatron, but found the end", ""),
        ("megatron:", "a training string is empty", ""),
        ("vllm:", "a rollout is empty", ""),
        ("vllm:(attn:d4|ffn:e4)", "attn and ffn are for training", "(attn:d4|ffn:e4)"),
        ("megatron[]:d4", "a name was expected", "]:d4"),
        ("megatron[4a]:d4", "a name was expected", "4a]:d4"),
        ("megatron[a-b]:d4", "']' was expected", "-b]:d4"),
        ("megatron[a:d4", "']' was expected", ":d4"),
        ("megatron:(attn:d4|ffn:e4", "never closed", "(attn:d4|ffn:e4"),
        ("megatron:attn:d4|ffn:e4)", "never opened", ")"),
        ("megatron:d4)", "complete here", ")"),
        ("megatron:(attn:d4|ffn:e4)x", "complete here", "x"),
        ("megatron:(attn:d4|ffn:e4))", "complete here", ")"),
    ],
)
def test_what_is_not_in_the_grammar_is_an_error_at_its_character(text: str, reason: str, rest: str) -> None:
    found, found_rest = error_at(text)
    assert reason in found and found_rest == rest


@pytest.mark.parametrize(
    ("text", "rest"),
    [("megatron:d2d4", "d4"), ("vllm:t2d1t2", "t2"), ("megatron:(attn:d4|ffn:e2d2e2)", "e2)")],
)
def test_a_repeated_axis_is_an_error_that_names_it(text: str, rest: str) -> None:
    reason, found_rest = error_at(text)
    assert f"axis '{rest[0]}' twice" in reason and found_rest == rest


def test_blanks_between_tokens_mean_nothing() -> None:
    spaced = " megatron [ a ] :\n ( attn : d 4\tt2 | ffn : e 8 ) \r\n"
    assert parse_spec(spaced) == parse_spec("megatron[a]:(attn:d4t2|ffn:e8)")
    assert parse_spec(" vllm : d 2 t 2 ") == parse_spec("vllm:d2t2")


def test_sizes_beyond_any_cluster_are_refused_before_arithmetic() -> None:
    assert error_at("megatron:d" + "9" * 5000)[0] == f"axis 'd' is at most {MAX_WORLD_SIZE}"
    assert "ranks; at most" in error_at(f"megatron:d{MAX_WORLD_SIZE}t2")[0]
    assert "ranks; at most" in error_at(f"vllm:d{MAX_WORLD_SIZE}t2")[0]
    assert parse_spec(f"megatron:d{MAX_WORLD_SIZE}").world_size == MAX_WORLD_SIZE


def test_an_error_shows_reason_string_and_caret() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec("megatron:(attn:d4p2t2e2|ffn:d2p2t4e2)")
    assert str(caught.value) == (
        "attn has no axis 'e'; its axes are d, p, t, c\n"
        "  megatron:(attn:d4p2t2e2|ffn:d2p2t4e2)\n"
        "                       ^"
    )
    assert isinstance(caught.value, MtrlError) and isinstance(caught.value, ValueError)


def test_the_caret_stands_right_under_tabs_and_line_ends() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec("megatron:\td4\nx2")
    assert str(caught.value).splitlines()[1:] == ["  megatron: d4 x2", "               ^"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (FOLDED, FOLDED),
        ("megatron:attn:c2t2p2d4|ffn:e2t4", FOLDED),
        ("megatron:(attn:d4t2|ffn:e8)", "megatron:d4t2e8"),
        ("megatron:e1c1t1p1d1", "megatron:d1"),
        ("megatron:(attn:t2|ffn:t2)", "megatron:(attn:t2|ffn:t2)"),
        ("megatron[a]:t2", "megatron[a]:t2"),
        ("vllm:p2t4d2", "vllm:d2t4p2"),
        ("sglang:t1", "sglang:d1"),
    ],
)
def test_str_is_canonical_and_parses_back(text: str, canonical: str) -> None:
    assert str(parse_spec(text)) == canonical
    assert parse_spec(canonical) == parse_spec(text)


def test_a_string_of_the_other_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="a training engine is needed"):
        parse_training_spec("vllm:d4")
    with pytest.raises(SpecError, match="a sampling engine is needed"):
        parse_rollout_spec("megatron:d4")


@pytest.mark.parametrize(
    ("attn", "ffn", "reason"),
    [
        (AttnAxes(dp=2), FfnAxes(edp=3), "share their ranks"),
        (AttnAxes(pp=2), FfnAxes(ep=2), "share their stages"),
        (AttnAxes(dp=0), FfnAxes(edp=0), "at least 1"),
        (AttnAxes(dp=2**21), FfnAxes(edp=2**21), "at most"),
    ],
)
def test_a_spec_built_by_hand_keeps_the_same_rules(attn: AttnAxes, ffn: FfnAxes, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        ParallelSpec(backend="megatron", attn=attn, ffn=ffn)


def test_a_spec_built_by_hand_checks_backend_and_name() -> None:
    with pytest.raises(SpecError, match="unknown backend"):
        RolloutSpec(backend="megatron")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="a name is"):
        RolloutSpec(backend="vllm", name="a b")
    with pytest.raises(SpecError, match="fsdp has no hybrid"):
        ParallelSpec(backend="fsdp", attn=AttnAxes(tp=2), ffn=FfnAxes(etp=2))


def test_specs_and_their_errors_survive_copying() -> None:
    # By the same protocol as pickling, which torchrun's error files use.
    spec = parse_spec(FOLDED)
    assert copy.deepcopy(spec) == spec
    error = SpecError("reason", "text", 2)
    assert str(copy.deepcopy(error)) == str(error)


def test_spec_and_layout_import_no_torch() -> None:
    check = "import sys, mtrl.parallel.layout; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
