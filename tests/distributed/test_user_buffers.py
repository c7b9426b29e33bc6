"""`actor.tp_comm_overlap` over the reference of Transformer Engine's modules, whose linears refuse what the
user buffers were not made for: training and forward passes alone give what they give without.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtrl.models.precision import Fp8
from tests.distributed.test_fp8_layouts import SIZES
from tests.distributed.toy_runs import MAX_TOKENS, batch, each_case, load_toy, microbatches, samples
from tests.distributed.world import World
from tests.family_toys import build_family_toy
from tests.family_toys import save as save_toy
from tests.toys import build_toy, write_weights

pytestmark = pytest.mark.one_stack

SPECS = {"megatron:t2": 2, "megatron:(attn:t2|ffn:e2)": 2, "megatron:(attn:t2c2|ffn:e4)": 4}
CASES = (
    ("megatron:t2", "qwen3"),
    ("megatron:(attn:t2|ffn:e2)", "glm4 moe"),  # shared experts, a dense layer
    ("megatron:(attn:t2c2|ffn:e4)", "qwen3 moe"),
)
FP8 = {
    "delayed": Fp8(recipe="fp8_delayed", gradients="e5m2"),
    "mxfp8": Fp8(recipe="mxfp8"),
    "mxfp8 and bf16": Fp8(recipe="mxfp8", bf16_first_layers=1),
}
SHORT = [3, 5]
"""Tokens of a batch that would fill a fraction of a row."""


def runs(folder: str, spec: str, toy: str) -> dict[str, Any]:
    """On a rank: three steps and a forward pass of a short batch, with and without overlap."""
    from transformer_engine.pytorch import user_buffers as reference

    from mtrl.models.backends.transformer_engine.user_buffers import user_buffers
    from mtrl.policy import row_length

    found: dict[str, Any] = {}
    for groups, *_ in each_case([[spec, 1, toy, toy]]):
        for overlaps in (False, True):
            options = {"tp_comm_overlap": True} if overlaps else {}
            model = load_toy(groups, 1, Path(folder) / toy, backend="transformer_engine", **options)
            if not overlaps:
                found["without"] = train(model)
                continue
            config = model.transformer_config
            with user_buffers(config, groups, row_length=row_length(model, MAX_TOKENS)):
                found["with"] = train(model)
            found["uses"] = dict(reference.uses)
            found["is given back"] = reference._buffers is None
            with user_buffers(config, groups, row_length=2 * row_length(model, MAX_TOKENS)):
                found["of another length"] = refusal(model)
            found["before there are any"] = refusal(model)
    return found


def fp8_runs(folder: str) -> dict[str, Any]:
    """On a rank, by FP8 recipe: what `train` finds with and without overlap, and the buffers' kinds."""
    from transformer_engine.pytorch import user_buffers as reference

    from mtrl.models.backends.transformer_engine.user_buffers import user_buffers
    from mtrl.policy import row_length

    found: dict[str, Any] = {}
    for groups, _, recipe, _ in each_case([["megatron:t2", 1, each, each] for each in FP8]):
        options = {"fp8": FP8[recipe], "precision": "bf16", "backend": "transformer_engine"}
        plain = train(load_toy(groups, 1, Path(folder) / "toy", **options))
        model = load_toy(groups, 1, Path(folder) / "toy", tp_comm_overlap=True, **options)
        length = row_length(model, MAX_TOKENS)
        with user_buffers(model.transformer_config, groups, row_length=length):
            kinds = sorted(kind.value for kind in reference._buffers.modes)
            found[recipe] = {"without": plain, "with": train(model), "kinds": kinds}
    return found


def train(model: Any) -> dict[str, Any]:
    from mtrl.config_engines import OptimizerSection
    from mtrl.objectives import SftLoss
    from mtrl.trainer import Trainer

    trainer = Trainer(model, OptimizerSection(lr=1e-2, eps=1e-2, grad_clip=0.5))
    trainer.start_phase(total_steps=3, lr=1e-2, warmup_steps=0)
    results, lengths = [], set()
    for number in range(3):
        rows = microbatches(model, batch(number))
        lengths |= {each.packed.tokens_T.numel() for each in rows}
        results.append(trainer.step(rows, SftLoss()))
    short = microbatches(model, samples(SHORT, seed=7))
    lengths |= {each.packed.tokens_T.numel() for each in short}
    logprobs = trainer.policy.logprobs(short)[0]
    weights = {str(key): tensor.detach() for key, tensor in model.tensors().items()}
    return {
        "losses": [each.loss for each in results], "norms": [each.grad_norm for each in results],
        "lengths": sorted(lengths), "weights": weights, "logprobs": trained(short[0], logprobs),
    }  # fmt: skip


def trained(row: Any, logprobs_T: torch.Tensor) -> torch.Tensor:
    return logprobs_T[row.packed.loss_mask_T]


def refusal(model: Any) -> str:
    """What the linears say to a batch."""
    from mtrl.policy import Policy

    try:
        Policy(model, model.chunks).logprobs(microbatches(model, batch(0)))
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "none"


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0].removeprefix('megatron:')} {case[1]}"
)
def found(
    request: pytest.FixtureRequest, te_world: World, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    spec, toy = request.param
    folder = tmp_path_factory.mktemp("buffers")
    save_toy(build_family_toy(toy, seed=3), folder / toy)
    results: list[dict[str, Any]] = te_world.run(
        runs, {"folder": str(folder), "spec": spec, "toy": toy}, size=SPECS[spec]
    )
    return results


def test_rows_of_every_batch_are_as_long_as_the_buffers(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["with"]["lengths"]) == 1 < len(rank["without"]["lengths"])


def test_every_linear_that_sends_tokens_takes_its_buffer(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert {"qkv", "proj"} <= set(rank["uses"]) <= {"qkv", "proj", "fc1", "fc2"}
    assert found[0]["is given back"]


def test_numbers_are_those_without_overlap(found: list[dict[str, Any]]) -> None:
    for rank in found:
        overlapped, plain = rank["with"], rank["without"]
        # Longer rows are other products of the same numbers, added in another order.
        assert overlapped["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert overlapped["norms"] == pytest.approx(plain["norms"], rel=1e-6)
        for name, weight in overlapped["weights"].items():
            assert (weight - plain["weights"][name]).abs().max() < 1e-6


def test_log_probabilities_of_a_short_batch_are_those_without_overlap(found: list[dict[str, Any]]) -> None:
    # Which context parallel rank has a token depends on the row's length.
    overlapped, plain = (
        torch.cat([rank[way]["logprobs"] for rank in found]).sort().values for way in ("with", "without")
    )
    assert overlapped.numel() and (overlapped - plain).abs().max() < 1e-5


def test_rows_of_another_length_or_no_buffers_are_told(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "but the user buffers are" in rank["of another length"]
        assert "initialize_ub comes before the first product" in rank["before there are any"]


@pytest.fixture(scope="module")
def in_fp8(te_world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fp8")
    write_weights(build_toy("dense", seed=5, **SIZES), folder / "toy")
    found: list[dict[str, Any]] = te_world.run(fp8_runs, {"folder": str(folder)}, size=2)
    return found


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_travels_in_buffers_of_its_own(in_fp8: list[dict[str, Any]], recipe: str) -> None:
    for rank in in_fp8:
        found = rank[recipe]
        assert found["kinds"] == (["fp8", "none"] if recipe == "mxfp8 and bf16" else ["fp8"])
        (length,) = found["with"]["lengths"]
        # Each rank's half: what the buffers ask of mxfp8, and products of FP8 in general.
        assert length % 2 == 0 and length // 2 % (16 if recipe == "delayed" else 128) == 0
        assert found["with"]["losses"] == pytest.approx(found["without"]["losses"], rel=1e-2)


def overlap_left(folder: str) -> list[bool]:
    """Whether Megatron's config of a model that was asked to overlap still says so."""
    found = []
    for groups, *_ in each_case([["megatron:t2", 1, "latent", "latent"]]):
        model = load_toy(groups, 1, Path(folder), backend="transformer_engine", tp_comm_overlap=True)
        found.append(model.transformer_config.tp_comm_overlap)
    return found


def test_megatron_overlaps_nothing_of_latent_attention(te_world: World, tmp_path: Path) -> None:
    # Where this fails, overlap_rules.py need not refuse it.
    save_toy(build_family_toy("deepseek v3", seed=3), tmp_path)
    assert te_world.run(overlap_left, {"folder": str(tmp_path)}, size=2) == [[False], [False]]
