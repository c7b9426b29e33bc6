"""A model whose linears run in FP8 blocks: against transformers' with the same products, and over layouts.

Widths are multiples of 128 on every rank, so that a rank's blocks are blocks of the whole weight, and there
are fewer tokens than a block holds, since a gradient of weights has blocks over tokens. Elsewhere they agree
as far as FP8 itself does.
"""

from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtrl.batch import Sample
from mtrl.models.precision import Fp8
from mtrl.parallel.spec import parse_training_spec
from tests.distributed.router_runs import whole_weights
from tests.distributed.selected import selected
from tests.distributed.toy_runs import open_trainer
from tests.distributed.world import World
from tests.family_toys import published
from tests.toys import build_toy, write_weights
from tests.unit.test_fp8_training import InBlocks

Found = dict[str, Any]
NUM_EXPERTS, VOCAB, LENGTH = 4, 12, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 256, "max_position_embeddings": 64,
    "moe_intermediate_size": 256, "num_experts": NUM_EXPERTS, "mlp_only_layers": [1],
    "experts_implementation": "eager", "initializer_range": 0.05,
}  # fmt: skip
LAYOUTS = (
    "megatron:t2",
    "megatron:p2",
    "megatron:(attn:d2|ffn:e2)",
    "megatron:(attn:t2|ffn:e2)",
    "megatron:(attn:p2t2|ffn:t2)",
)
WAYS: dict[str, Fp8] = {
    "all layers": Fp8(),
    "e5m2": Fp8(gradients="e5m2"),
    "torch's products": Fp8(products="scaled_mm"),
    "first and last in bf16": Fp8(bf16_first_layers=1, bf16_last_layers=1),
}
# Measured: losses within 5e-8, most updates within 4e-5. A number on the edge between two of the format's
# goes either way when what led to it is added up in another order: one did, and moved an update by 7e-3.
LOSS, UPDATE = 1e-6, 1e-2
LR, EPS, CLIP, BETAS = 1e-2, 1e-2, 0.5, (0.9, 0.95)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_weights(build_toy("moe", seed=5, **SIZES), folder)
    return folder


def samples() -> list[Sample]:
    """Rows without padding, which would be in blocks too."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(VOCAB, (2, LENGTH), generator=generator).tolist()
    mask = (False, *[True] * (LENGTH - 1))
    return [Sample(sample_id=n, tokens=tuple(row), loss_mask=mask) for n, row in enumerate(rows)]


def experts(self: Any, x_TF: Tensor, chosen_TK: Tensor, probs_TK: Tensor) -> Tensor:
    """transformers' experts with the router's probability before the second product, where Megatron has it:
    it is a factor of what that product quantises.
    """
    sum_TF = torch.zeros_like(x_TF)
    for number in range(NUM_EXPERTS):
        token, place = torch.where(chosen_TK == number)
        gate, up = F.linear(x_TF[token], self.gate_up_proj[number]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * probs_TK[token, place, None]
        sum_TF = sum_TF.index_add(0, token, F.linear(hidden, self.down_proj[number]))
    return sum_TF


def by_transformers(way: str) -> Found:
    """Loss, and weights after a step, of transformers' model and torch's optimizer."""
    model = build_toy("moe", seed=5, **SIZES)
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.forward = MethodType(experts, module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    losses = []
    for sample in samples():
        ids = torch.tensor([sample.tokens])
        with InBlocks(WAYS[way].gradients) if way in WAYS else nullcontext():
            logits = model(ids).logits[0]
        # Summed, as Megatron's: dividing first would move gradients against the format's numbers.
        loss = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        loss.backward()
        losses.append(float(loss))
    num_tokens = len(losses) * (LENGTH - 1)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad /= num_tokens
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return {"loss": sum(losses) / num_tokens, "weights": published(model)}


def train(folder: str, specs: list[str], ways: list[str]) -> dict[str, Found]:
    """On a rank: the first step's loss and the weights after it, each way on each layout."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf
    from mtrl.objectives import SftLoss
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.policy import make_microbatches

    found = {}
    for spec in specs:
        groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(spec)))
        parallel_groups.seed_everything(1, groups)
        for way in ways:
            model = build_model(load_model_config(Path(folder)), groups, fp8=WAYS.get(way))
            load_hf(model, Path(folder))
            trainer = open_trainer(model, distributed=False, lr=LR)
            rows = make_microbatches(samples(), model, max_tokens=LENGTH, pad_token_id=0)
            step = trainer.step(rows, SftLoss())
            found[f"{spec} {way}"] = {"loss": step.loss, "weights": whole_weights(model)}
        parallel_groups.destroy()
    return found


def distance(found: Found, expected: Found, start: dict[str, Tensor]) -> float:
    """The largest relative error of a weight's update."""
    assert found["weights"].keys() == expected["weights"].keys() == start.keys()
    return max(
        float((found["weights"][name] - new).norm() / (new - start[name]).norm())
        for name, new in expected["weights"].items()
    )


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, world: World, toy: Path) -> dict[str, Found]:
    found: dict[str, Found] = {}
    specs = ("megatron:d1", *selected(request, "spec"))
    for size in (1, 2, 4):
        chosen = [spec for spec in specs if parse_training_spec(spec).world_size == size]
        if not chosen:
            continue
        ways = ["fp32", *WAYS] if size == 1 else ["all layers"]
        arguments = {"folder": str(toy), "specs": chosen, "ways": ways}
        found |= world.run(train, arguments, size=size, timeout_s=240.0)[0]
    return found


@pytest.fixture(scope="module")
def start() -> dict[str, Tensor]:
    return published(build_toy("moe", seed=5, **SIZES))


@pytest.mark.parametrize("way", ["fp32", "all layers", "e5m2", "torch's products"])
def test_a_step_in_blocks_is_that_of_transformers_model_with_the_same_products(
    trained: dict[str, Found], start: dict[str, Tensor], way: str
) -> None:
    found, expected = trained[f"megatron:d1 {way}"], by_transformers(way)
    assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS)
    assert distance(found, expected, start) < UPDATE


def test_fp8_changes_the_step_and_fewer_layers_of_it_change_it_less(
    trained: dict[str, Found], start: dict[str, Tensor]
) -> None:
    exact = trained["megatron:d1 fp32"]
    far = {way: distance(trained[f"megatron:d1 {way}"], exact, start) for way in WAYS}
    assert abs(far.pop("torch's products") - far["all layers"]) < UPDATE
    assert 10 * UPDATE < far["first and last in bf16"] < far["all layers"] < far["e5m2"]


@pytest.mark.parametrize(
    "spec", [LAYOUTS[0], *(pytest.param(spec, marks=pytest.mark.one_stack) for spec in LAYOUTS[1:])]
)
def test_layouts_agree(trained: dict[str, Found], start: dict[str, Tensor], spec: str) -> None:
    found, expected = trained[f"{spec} all layers"], trained["megatron:d1 all layers"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS)
    assert distance(found, expected, start) < UPDATE
