"""What `tools/validate_installation.py` prints, and when it ends with 1."""

import json

import pytest

from mtrl.tools import group_check
from mtrl.tools.validate_installation import main

pytestmark = pytest.mark.one_stack


def test_it_ends_with_0_on_a_machine_that_lacks_only_what_nobody_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--require", "train"]) == 0
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()[-1]
    assert last.startswith("ready for: train") and "Traceback" not in printed


def test_it_ends_with_1_and_the_reason_where_something_asked_for_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Neither is built in mtrl yet, so no machine has them.
    assert main(["--json", "--require", "deepep,fp8"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report["missing"]) == {"deepep", "fp8"} and all(report["missing"].values())
    assert len(report["packages"]) == 12 and not set(report["missing"]) & set(report["ready"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--require", "flashmla"], "did you mean flash_mla"),
        (["--spec", "megatron:(attn:d2e2)"], "SpecError"),
        (["--spec", "megatron:d2", "--nproc", "3"], "needs d2*p1*t1*c1 = 2 ranks, but torchrun started 3"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert told in printed.err and printed.out == ""


def test_every_group_of_a_folded_layout_passes_its_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--spec", "megatron:(attn:t2|ffn:e2)", "--nproc", "2"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    wide = {group["group"] for group in groups if group["ranks"] == [0, 1]}
    assert wide == {"attn.tp", "ffn.ep"} and all(group["right"] for group in groups)
    collectives = {group["collective"] for group in groups if group["group"] == "ffn.ep"}
    assert collectives == set(group_check.COLLECTIVES)
    assert all(group["bytes_per_s"] > 0 for group in groups if group["group"] in wide)


def test_a_collective_that_gives_wrong_numbers_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"group": "ffn.ep", "ranks": [0, 1], "collective": "all_reduce", "right": False}
    monkeypatch.setattr(
        "mtrl.tools.validate_installation.check_groups",
        lambda text, num_processes: [lost | {"num_bytes": 4, "bytes_per_s": 1.0}],
    )
    assert main(["--spec", "megatron:d2"]) == 1
    assert "NO" in capsys.readouterr().out
