"""What `tools/show_layout.py` says of a push: with two strings and a config, in seconds, up to 1,024
ranks.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtrl.tools.push_score import PushScore, gigabytes
from mtrl.tools.show_layout import main

pytestmark = pytest.mark.one_stack

CONFIGS = Path(__file__).parents[1] / "model_configs"
QWEN = str(CONFIGS / "Qwen3-30B-A3B")
LARGE = (
    ("Qwen3-30B-A3B", "megatron:(attn:d64t2|ffn:e8)", "vllm:d32t4"),
    ("Qwen3-235B-A22B", "megatron:(attn:d64p4t4|ffn:e32)", "vllm:d64t16"),
    ("DeepSeek-V3", "megatron:(attn:d16p16t4|ffn:e64)", "vllm:d32t32"),
    ("Kimi-K2", "megatron:(attn:d16p16t4|ffn:e32)", "vllm:d32t32"),
)


def cells(printed: str, what: str) -> list[str]:
    line = next(line for line in printed.splitlines() if what in line)
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_the_tables_say_what_moves(capsys: pytest.CaptureFixture[str]) -> None:
    train = "megatron:(attn:d8|ffn:e8)"
    assert main([train, "vllm:d2t4", "--model", QWEN, "--gpus-per-node", "4"]) == 0
    printed = capsys.readouterr().out
    assert "8 ranks on 2 nodes of 4" in printed  # the trainer's layout, as without a rollout
    assert cells(printed, "an engine rank reads")[1:] == ["15.3 GB", "15.3 GB", "122 GB"]
    assert cells(printed, "a rank receives ")[1:] == ["12.7 GB", "12.7 GB", "101 GB"]
    # Half of the experts are on the other node, and cross once for all four ranks.
    assert cells(printed, "a node receives ")[1:] == ["29 GB", "29 GB", "58 GB"]
    assert cells(printed, "on its rank already")[2] == "17.0%"
    assert cells(printed, "│ 1 │")[1] == "vllm:t8 with expert parallelism"
    assert cells(printed, "│ 1 │")[3] == "0 GB"


def test_expert_parallel_engines_that_lie_as_the_trainer_receive_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["megatron:(attn:d8|ffn:e8)", "vllm:t8", "--model", QWEN, "--expert-parallel"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "a rank receives ")[1:] == ["0 GB"] * 3
    assert cells(printed, "on its rank already")[2] == "100.0%"


@pytest.mark.parametrize(("model", "train", "rollout"), LARGE)
def test_hundreds_of_ranks_take_seconds(model: str, train: str, rollout: str) -> None:
    start = time.process_time()
    found = PushScore.of(train, rollout, CONFIGS / model, 8, expert_parallel=True)
    assert time.process_time() - start < 10
    received = [int(each.received.max()) for each in found.others]
    assert received == sorted(received) and len(found.others) >= 8
    assert any(each.engines == found.given.engines for each in found.others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["megatron:d2", "vllm:t2"], "LayoutError: a push is of some model: give --model"),
        (["megatron:d2", "vllm:t4", "--model", QWEN], "LayoutError: megatron:d2 has 2 ranks and vllm:t4 4"),
        (["vllm:t2", "megatron:d2", "--model", QWEN], "SpecError: vllm samples"),
        (["megatron:d5", "vllm:t5", "--model", QWEN], "LayoutError: vllm:t5: 4 KV heads cannot be shared"),
        (["megatron:t8", "vllm:t8", "--model", QWEN], "LayoutError: megatron:t8: KV heads 4 cannot be split"),
        (
            ["megatron:d2", "vllm:t2", "--model", QWEN, "--gpus-per-node", "0"],
            "LayoutError: --gpus-per-node 0",
        ),
        (["megatron:d2", "vllm:t2", "--model", "nowhere"], "ModelError: no config.json at nowhere"),
    ],
)
def test_a_push_that_cannot_be_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.out == ""


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_it_loads_no_torch(tmp_path: Path, dtype: str) -> None:
    script = Path(__file__).parents[2] / "tools" / "show_layout.py"
    run = (
        f"import runpy, sys; sys.argv = [sys.argv[1], 'megatron:d2', 'vllm:t2', '--model', {QWEN!r}]\n"
        f"sys.argv += ['--rollout-dtype', {dtype!r}]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: sys.exit(done.code or ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", run, str(script)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"a rank receives +│", result.stdout)


def test_bytes_are_three_digits() -> None:
    assert [gigabytes(number) for number in (0, 57_917_440, 43_936_587_776, 1.34e12)] == [
        "0 GB", "0.0579 GB", "43.9 GB", "1.34 TB",
    ]  # fmt: skip
