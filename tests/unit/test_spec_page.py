"""The allocation string's page for users, and the examples in its docstrings, say what the parser does."""

import doctest
import re
from pathlib import Path

import pytest

from mtrl.parallel import spec as spec_module
from mtrl.parallel.errors import SpecError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_spec, parse_training_spec


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(spec_module)
    assert result.attempted >= 4 and result.failed == 0


DOCS = (Path(__file__).parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")


def test_the_strings_of_the_user_s_page_parse_and_its_wrong_ones_do_not() -> None:
    strings = set(re.findall(r"(?:megatron|vllm)(?:\[\w+\])?:[^\s`\"]+", DOCS))
    wrong = {"megatron:(attn:d4p2t2c2|ffn:e3)", "vllm:d4+megatron:d4"}
    assert wrong < strings and len(strings) >= 10
    for text in strings - wrong:
        parse_spec(text)
    with pytest.raises(SpecError) as caught:
        parse_spec("megatron:(attn:d4p2t2c2|ffn:e3)")
    assert f"```\n{caught.value}\n```" in DOCS


def test_the_groups_in_the_user_s_page_are_right() -> None:
    layout = RankLayout.from_spec(parse_training_spec("megatron:(attn:d2t2|ffn:e4)"))
    rows = re.findall(r"\| ((?:attn|ffn)\.\w+) group \| (.+) \|", DOCS)
    assert [axis for axis, _ in rows] == ["attn.tp", "attn.dp", "ffn.ep", "ffn.edp"]
    for axis, cells in rows:
        owners = {rank: str(number) for number, group in enumerate(layout.groups(axis)) for rank in group}
        assert cells.split(" | ") == [owners[rank] for rank in range(4)]
