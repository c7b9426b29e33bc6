"""Laws that only a GPU can break. They have never run: no GPU was at hand when they were written
(docs/verified.md). Each works through a process of its own: see on_device.py.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from mtrl.tools.bench import gpu
from tests.house import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.one_stack]
# The first use of CUDA compiles and loads for a while.
LIMIT_S = 280


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The script's stages that hold laws, in small, on the GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    files = ["--json", str(folder / "gpu.json"), "--page", str(folder / "gpu.md")]
    arguments = ["--size", "tiny", "--limit-s", str(LIMIT_S), "--stages", "parity", "fp8", "fused", "push"]
    arguments += files
    assert gpu.main(arguments) == 0
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


def on_device(what: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.on_device", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ran(row: dict[str, Any]) -> dict[str, Any]:
    """A row that was measured; a test of what this machine lacks is skipped with the reason."""
    if row["status"] == "obstacle":
        pytest.skip(row["reason"])
    assert row["status"] == "done", row["reason"]
    return row


@pytest.mark.parametrize("way", [*gpu.PARITY, *gpu.TE_PARITY])
def test_losses_of_five_steps_agree_with_those_on_a_cpu(report: dict[str, Any], way: str) -> None:
    """Within gpu_page.TOLERANCES, which say why they are what they are."""
    row = ran(report["stages"]["parity"][way])
    assert row["device"].startswith("cuda")
    assert report["stages"]["parity"]["CPU torch_native bf16"]["device"] == "cpu"
    fact = report["summary"]["parity"][way]
    assert fact["agrees"], fact


@pytest.mark.parametrize("path", ["reference", "block_sums", "transformer_engine", "scaled_mm"])
def test_fp8_products_stay_within_the_bound_of_the_format(report: dict[str, Any], path: str) -> None:
    rows = [row for name, row in report["stages"]["fp8"].items() if name.split()[0] == path]
    assert rows
    for row in rows:
        products = [value for value in ran(row).values() if isinstance(value, dict)]
        assert products and all(product["of_bound"] <= 1 for product in products), row
        # One number's rounding, which is far above bf16's of results and sums that go another way.
        assert all(product["from_reference"] <= 2**-4 for product in products), row


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        # float32 holds log-probabilities of 30 to 2e-6; bf16 results of 6 to 2^-6.
        ("log-probabilities mtrl.logprobs", 1e-5),
        ("log-probabilities fla.modules.fused_cross_entropy", 1e-5),
        ("rotation torch.compile", 0.05),
    ],
)
def test_a_fused_kernel_gives_megatrons_numbers(report: dict[str, Any], name: str, tolerance: float) -> None:
    assert ran(report["stages"]["fused"][name])["differs_by"] < tolerance


def test_pushed_copies_are_equal_on_the_device(report: dict[str, Any]) -> None:
    rows = report["stages"]["push"]
    assert len(rows) == 2 and all(ran(row)["equal"] for row in rows.values())


def test_a_shelf_frees_the_memory_of_a_cuda_tensor_and_gives_it_back_the_same() -> None:
    found = on_device("shelf")
    for turn in range(2):
        assert found[f"away {turn}"] == found["before"] - found["nbytes"]
        assert found[f"back {turn}"] == found["before"]
    assert found["equal"] and found["is_view"]


def test_a_trainer_put_away_frees_all_that_it_holds_and_trains_on() -> None:
    found = on_device("trainer_host_copies")
    # What is held once in several tensors counts once; allocations are in multiples of 512 bytes.
    assert found["before"] - found["away"] >= found["held"] > 0
    assert found["back"] >= found["before"] and found["equal"]
    assert found["losses"][2] < found["losses"][1] < found["losses"][0]


def test_an_optimizer_that_steps_on_the_host_trains_alike_and_leaves_the_device_its_memory() -> None:
    found = on_device("host_steps")
    plain, half, whole = (found[fraction] for fraction in ("0.0", "0.5", "1.0"))
    for each in (half, whole):
        # Two kernels of Adam, and bf16 weights.
        assert each["losses"] == pytest.approx(plain["losses"], rel=1e-2)
        assert each["held"] == each["all"] - each["host"]
    assert plain["host"] == 0 < half["host"] < whole["host"] == whole["all"] == plain["all"]
    assert whole["on device"] < half["on device"] < plain["on device"]


def test_every_collective_of_every_group_of_one_rank_is_right_over_nccl() -> None:
    found = on_device("groups_of_one")
    assert found["backend"] == "nccl"
    assert len(found["rows"]) == 27 and all(row["right"] for row in found["rows"])
