"""Training under every layout is training in one process, and its gradients are transformers'.

Covers mtrl's trainer on Megatron's schedules, DDP and optimizers: losses, gradients, their norm, the weights
after three steps, NaN, and weights swapped for a while.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.toy_runs import (
    CASES,
    Case,
    Runs,
    batch,
    each_case,
    load_toy,
    microbatches,
    open_trainer,
    write_toys,
)
from tests.distributed.world import World
from tests.toys import hf_gradients

# Every kind of layout once: three steps cost more than a forward pass.
TRAINED = tuple(
    case
    for case in CASES
    if case.size == 1
    or str(case)
    in {
        *("d2 dense", "t2 dense tied", "t2 moe", "p2 moe 3 layers tied", "p2 v2 moe tied"),
        *("(attn:d2|ffn:e2) moe", "(attn:d2|ffn:e2) mixed", "(attn:t2|ffn:e2) moe"),
        *("(attn:d2|ffn:t2) moe", "(attn:t2|ffn:t2) moe"),
        *("d2t2 moe", "p4 moe tied", "(attn:d2t2|ffn:e4) moe", "(attn:d2t2|ffn:t2e2) moe tied"),
        *("(attn:p2t2|ffn:e2) mixed", "(attn:p2t2|ffn:t2) moe 3 layers tied", "(attn:p2t2|ffn:e2) v2 moe"),
        *(
            "(attn:d2p2t2|ffn:t2e2) moe",
            "(attn:d2p2t2|ffn:e4) moe 3 layers tied",
            "(attn:d2t4|ffn:e8) moe tied",
        ),
    }
)
# float32 sums in another order. A tensor's gradients are compared relative to its largest one.
GRADIENT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toys, each with transformers' gradients of the first batch's mean loss beside it."""
    folder = tmp_path_factory.mktemp("toys")
    for name, model in write_toys(folder).items():
        nll, num_tokens = torch.zeros(()), 0
        for sample in batch(0):
            tokens, mask = torch.tensor(sample.tokens), torch.tensor(sample.loss_mask)
            logprobs = model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
            nll = nll - logprobs[mask[1:]].sum()
            num_tokens += int(mask.sum())
        (nll / num_tokens).backward()
        gradients = {key: value.contiguous() for key, value in hf_gradients(model).items()}
        save_file(gradients | {"loss": (nll / num_tokens).detach()}, folder / name / "gradients.reference")
    return folder


def gradient_errors(model: Any, reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """By Hugging Face name: the largest error of this rank's gradients, relative to the tensor's largest."""
    from mtrl.models.pieces import read_stored

    gradients = {key: parameter.main_grad for key, parameter in model.parameters().items()}
    errors: dict[str, float] = {}
    for piece in model.weight_map.of_rank(model.groups.rank).pieces:
        for simple in piece.simple():
            full = reference[simple.hf.name]
            error = (
                read_stored(gradients, simple) - full[simple.stored.slices]
            ).abs().max() / full.abs().max()
            errors[simple.hf.name] = max(errors.get(simple.hf.name, 0.0), float(error))
    return errors


def train(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Per case and optimizer: three steps' losses and gradient norms, the weights after them (of rank 0);
    and the errors of the first gradients."""
    from mtrl.objectives import SftLoss

    found: dict[str, Any] = {}
    for groups, num_chunks, toy, name in each_case(cases):
        reference = load_file(Path(folder) / toy / "gradients.reference")
        found[name] = {"reference_loss": float(reference["loss"])}
        for distributed in (False, True):
            model = load_toy(groups, num_chunks, Path(folder) / toy)
            trainer = open_trainer(model, distributed=distributed)
            if not distributed:
                trainer.policy.run(microbatches(model, batch(0)), SftLoss(), forward_only=False)
                found[name]["gradient_errors"] = gradient_errors(model, reference)
            steps = [trainer.step(microbatches(model, batch(step)), SftLoss()) for step in range(3)]
            found[name]["zero" if distributed else "plain"] = {
                "loss": [step.loss for step in steps],
                "grad_norm": [step.grad_norm for step in steps],
                "num_tokens": [step.num_tokens for step in steps],
                "weights": whole_weights(model),
            }
    return found


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights, on rank 0; nothing on the others. Collective over WORLD."""
    from mtrl.models.gather import TensorGather

    others: list[list[str]] = [[] for _ in range(model.groups.layout.world_size - 1)]
    return dict(TensorGather(model, [list(model.weight_map.hf_shapes()), *others]).run(torch.float32))


@pytest.fixture(scope="module")
def trained(world: World, toys: Path) -> Runs:
    return Runs(world, train, toys, TRAINED)


def one_process(trained: Runs, case: Case) -> Any:
    return trained(next(each for each in TRAINED if each.toy == case.toy and each.size == 1))[0]["plain"]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_gradients_are_those_of_transformers(trained: Runs, toys: Path, case: Case) -> None:
    errors: dict[str, float] = {}
    for rank in trained(case):
        for name, error in rank["gradient_errors"].items():
            errors[name] = max(errors.get(name, 0.0), error)
        assert rank["plain"]["loss"][0] == pytest.approx(rank["reference_loss"], rel=1e-6)
    assert set(errors) == set(load_file(toys / case.toy / "gradients.reference")) - {"loss"}
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: largest relative error of a gradient {errors[worst]:.1e}, of {worst}")
    assert errors[worst] < GRADIENT_TOLERANCE


@pytest.mark.parametrize("optimizer", ["plain", "zero"])
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_three_steps_are_those_of_one_process(trained: Runs, case: Case, optimizer: str) -> None:
    expected = one_process(trained, case)
    ranks = [rank[optimizer] for rank in trained(case)]
    for rank in ranks:
        assert rank["num_tokens"] == [sum(each.num_loss_tokens for each in batch(step)) for step in range(3)]
        assert rank["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert rank["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert expected["loss"][0] != expected["loss"][1]
    found = ranks[0]["weights"]
    difference = max(float((found[n] - expected["weights"][n]).abs().max()) for n in expected["weights"])
    print(f"{case}: largest difference of a weight after three steps {difference:.1e}")
    assert set(found) == set(expected["weights"])
    assert difference < 1e-6
