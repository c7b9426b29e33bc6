"""What must never happen to the weights, and what must not matter to a loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtrl.batch import Sample
from tests.distributed.toy_runs import (
    Case,
    Runs,
    batch,
    each_case,
    load_toy,
    microbatches,
    open_trainer,
    samples,
    write_toys,
)
from tests.distributed.world import World

CASES = (
    Case(spec="megatron:d1", size=1, toy="moe"),
    Case(spec="megatron:t2", size=2, toy="dense tied"),
    Case(spec="megatron:t2", size=2, toy="moe"),
    Case(spec="megatron:(attn:d2|ffn:e2)", size=2, toy="moe"),
    Case(spec="megatron:p2", size=2, toy="moe 3 layers tied"),
    Case(spec="megatron:(attn:d2t2|ffn:e4)", size=4, toy="moe"),
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    return folder


class Poison:
    """SFT's loss, poisoned in the microbatches that hold sample 0: others are as usual."""

    names = ()

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, logprobs_T: torch.Tensor, microbatch: Any) -> tuple[torch.Tensor, Any]:
        loss = -logprobs_T[microbatch.packed.loss_mask_T].sum()
        if 0 not in microbatch.packed.sample_ids:
            return loss, {}
        if self.kind == "gradient":
            return loss + (0.0 * logprobs_T[0]).abs().sqrt(), {}  # the root's slope at 0 is infinite
        return loss * float(self.kind), {}


def spoil(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Per case and kind of poison: what was raised, whether weights moved, and what the next step does."""
    from mtrl.objectives import SftLoss
    from mtrl.parallel.errors import NonFiniteError

    found: dict[str, Any] = {}
    for groups, num_chunks, toy, name in each_case(cases):
        untouched = open_trainer(load_toy(groups, num_chunks, Path(folder) / toy), distributed=True)
        after = untouched.step(microbatches(untouched.model, batch(1)), SftLoss())
        trainer = open_trainer(load_toy(groups, num_chunks, Path(folder) / toy), distributed=True)
        before = trainer.copy_weights()
        messages = {}
        for kind in ("nan", "inf", "gradient"):
            with pytest.raises(NonFiniteError) as raised:
                trainer.step(microbatches(trainer.model, batch(0)), Poison(kind))
            messages[kind] = str(raised.value)
            pairs = zip(trainer.copy_weights(), before, strict=True)
            assert all(torch.equal(now, then) for now, then in pairs), f"{kind} reached the weights"
        result = trainer.step(microbatches(trainer.model, batch(1)), SftLoss())
        pairs = zip(trainer.copy_weights(), untouched.copy_weights(), strict=True)
        found[name] = {
            "messages": messages,
            "same_step": result == after,
            "same_weights": all(torch.equal(now, then) for now, then in pairs),
        }
    return found


@pytest.fixture(scope="module")
def spoiled(world: World, toys: Path) -> Runs:
    return Runs(world, spoil, toys, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(spoiled: Runs, case: Case) -> None:
    for rank in spoiled(case):
        assert rank["messages"]["nan"].startswith("the loss is not finite (loss sum nan")
        assert rank["messages"]["inf"].startswith("the loss is not finite (loss sum inf")
        assert rank["messages"]["gradient"].startswith("the gradient is not finite")
        assert rank["same_step"] and rank["same_weights"]


def vary(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Per case: what stays when padding, packing, padded weights and temporary weights change."""
    found: dict[str, Any] = {}
    for groups, num_chunks, toy, name in each_case(cases):
        path = Path(folder) / toy
        found[name] = {
            "batches": losses_of_batches(groups, num_chunks, path),
            "padding": fill_the_padding(groups, num_chunks, path),
            "swap": swap(groups, num_chunks, path),
        }
    return found


def losses_of_batches(groups: Any, num_chunks: int, path: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of one batch in several disguises, and of none."""
    from mtrl.objectives import SftLoss
    from mtrl.policy import make_microbatches

    untrained = [
        Sample(sample_id=90 + each.sample_id, tokens=each.tokens, loss_mask=(False,) * len(each.tokens))
        for each in samples([7, 21], seed=50)
    ]
    disguises: dict[str, tuple[list[Sample], int, int]] = {
        "plain": (batch(0), 40, 0),
        "other padding": (batch(0), 40, 55),
        "packed more": (batch(0), 200, 0),
        "packed less": (batch(0), 30, 0),
        "untrained samples": ([*batch(0), *untrained], 40, 0),
        "other order": (batch(0)[::-1], 40, 0),
        "nothing trained": (untrained, 40, 0),
        # Most experts, and all of some ranks, get no token.
        "one short sample": ([Sample(sample_id=0, tokens=(5, 9), loss_mask=(False, True))], 40, 0),
    }
    found = {}
    for disguise, (chosen, max_tokens, pad_token_id) in disguises.items():
        trainer = open_trainer(load_toy(groups, num_chunks, path), distributed=True)
        rows = make_microbatches(chosen, trainer.model, max_tokens=max_tokens, pad_token_id=pad_token_id)
        result = trainer.step(rows, SftLoss())
        found[disguise] = [result.loss, result.grad_norm, result.num_tokens]
    return found


def fill_the_padding(groups: Any, num_chunks: int, path: Path) -> dict[str, Any]:
    """Log-probabilities before and after the rows of no token became large, and those rows' gradients."""
    from mtrl.models.pieces import local_region
    from mtrl.objectives import SftLoss

    trainer = open_trainer(load_toy(groups, num_chunks, path), distributed=False)
    model, rows = trainer.model, microbatches(trainer.model, batch(0))
    before = torch.stack(trainer.policy.logprobs(rows))
    paddings = model.weight_map.of_rank(groups.rank).paddings
    for padding in paddings:
        local_region(model.parameters(), padding).fill_(3.0)
    after = torch.stack(trainer.policy.logprobs(rows))
    trainer.policy.run(rows, SftLoss(), forward_only=False)
    gradients = {key: parameter.main_grad for key, parameter in model.parameters().items()}
    slopes = [float(local_region(gradients, padding).abs().max()) for padding in paddings]
    num_rows = sum(padding.local_box.shape[0] for padding in paddings)
    return {"same": torch.equal(before, after), "slope": max(slopes, default=0.0), "num_rows": num_rows}


def swap(groups: Any, num_chunks: int, path: Path) -> dict[str, bool]:
    """Whether log-probabilities are the other weights' while those are in, and the policy's own after."""
    trainer = open_trainer(load_toy(groups, num_chunks, path), distributed=True)
    rows = microbatches(trainer.model, batch(0))
    own, weights = torch.stack(trainer.policy.logprobs(rows)), trainer.copy_weights()
    other = [weight * 0.5 for weight in weights]
    with pytest.raises(RuntimeError, match="in the middle"), trainer.weights_swapped(other):
        inside = torch.stack(trainer.policy.logprobs(rows))
        assert all(torch.equal(a, b) for a, b in zip(trainer.copy_weights(), other, strict=True))
        raise RuntimeError("in the middle")
    return {
        "restored": all(torch.equal(a, b) for a, b in zip(trainer.copy_weights(), weights, strict=True)),
        "same after": torch.equal(torch.stack(trainer.policy.logprobs(rows)), own),
        "other inside": not torch.allclose(inside, own),
    }


@pytest.fixture(scope="module")
def varied(world: World, toys: Path) -> Runs:
    return Runs(world, vary, toys, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_packing_and_order_do_not_matter_to_a_step(varied: Runs, case: Case) -> None:
    for rank in varied(case):
        batches = rank["batches"]
        for disguise in ("other padding", "packed more", "packed less", "untrained samples", "other order"):
            assert batches[disguise] == pytest.approx(batches["plain"], rel=1e-6), disguise


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_batch_that_trains_nothing_changes_nothing(varied: Runs, case: Case) -> None:
    for rank in varied(case):
        assert rank["batches"]["nothing trained"] == [0.0, 0.0, 0]


def test_ranks_whose_experts_get_no_token_train_on(varied: Runs) -> None:
    cases = [case for case in CASES if case.toy == "moe"]
    expected = varied(cases[0])[0]["batches"]["one short sample"]
    assert expected[2] == 1
    for case in cases[1:]:
        for rank in varied(case):
            assert rank["batches"]["one short sample"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_pad_the_vocabulary_have_no_probability_and_no_gradient(varied: Runs, case: Case) -> None:
    ranks = [rank["padding"] for rank in varied(case)]
    assert all(rank["same"] and rank["slope"] == 0.0 for rank in ranks)
    # 101 tokens over two ranks: the second holds a row of padding.
    assert (sum(rank["num_rows"] for rank in ranks) > 0) == ("t2" in case.spec)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_swapped_weights_come_back_bit_by_bit_even_after_an_error(varied: Runs, case: Case) -> None:
    for rank in varied(case):
        assert all(rank["swap"].values()), rank["swap"]


def train_dense(folder: str, sequence_parallel: list[bool]) -> list[Any]:
    """Two steps of a dense model over two tensor parallel ranks, with and without sequence parallelism."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf
    from mtrl.objectives import SftLoss

    path, found = Path(folder) / "dense tied", []
    for groups, num_chunks, _, _ in each_case([["megatron:t2", 1, "dense tied", "dense"]]):
        for is_on in sequence_parallel:
            model = build_model(
                load_model_config(path), groups, num_chunks=num_chunks, sequence_parallel=is_on
            )
            load_hf(model, path)
            trainer = open_trainer(model, distributed=True)
            steps = [trainer.step(microbatches(model, batch(step)), SftLoss()) for step in (0, 1)]
            found.append([[step.loss, step.grad_norm] for step in steps])
    return found


def test_a_dense_model_trains_alike_without_sequence_parallelism(world: World, toys: Path) -> None:
    arguments: dict[str, object] = {"folder": str(toys), "sequence_parallel": [True, False]}
    for with_it, without in world.run(train_dense, arguments, size=2):
        for step, other in zip(with_it, without, strict=True):
            assert other == pytest.approx(step, rel=1e-6)
