"""Logits through Megatron's pipeline schedule, packed, equal transformers' of each sequence by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.toy_runs import CASES, Case, Runs, each_case, load_toy, samples, write_toys
from tests.distributed.world import World

pytestmark = pytest.mark.one_stack

LENGTHS = [9, 17, 1, 30, 12, 2, 24, 5]
MAX_TOKENS = 40
# float32 sums in another order, of logits of order 1. Measured on both stacks: 1.1e-6 at most.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toys, each with transformers' logits of every sample beside it."""
    folder = tmp_path_factory.mktemp("toys")
    for name, model in write_toys(folder).items():
        with torch.no_grad():
            logits = {
                str(sample.sample_id): model(torch.tensor([sample.tokens])).logits[0]
                for sample in samples(LENGTHS, seed=3)
            }
        save_file(logits, folder / name / "logits.reference")
    return folder


def compare(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Per case, by sample: largest difference of this rank's logits and of its log-probabilities."""
    found = {}
    for groups, num_chunks, toy, name in each_case(cases):
        reference = load_file(Path(folder) / toy / "logits.reference")
        found[name] = differences(load_toy(groups, num_chunks, Path(folder) / toy), reference)
    return found


def differences(model: Any, reference: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    from mtrl.policy import Policy, make_microbatches

    batch = samples(LENGTHS, seed=3)
    microbatches = make_microbatches(batch, model, max_tokens=MAX_TOKENS, pad_token_id=0)
    captured: list[torch.Tensor] = []
    output_layer = getattr(model.chunks[-1], "output_layer", None)
    if output_layer is not None:
        output_layer.register_forward_hook(lambda module, inputs, output: captured.append(output[0]))
    logprobs = Policy(model, model.chunks).logprobs(microbatches)
    found: dict[str, dict[str, float]] = {"logits": {}, "logprobs": {}}
    logits = [whole_vocabulary(each.squeeze(1), model) for each in captured]
    for number, microbatch in enumerate(microbatches):
        bounds = microbatch.packed.cu_seqlens.tolist()
        for place, sample_id in enumerate(microbatch.packed.sample_ids):
            rows = slice(bounds[place], bounds[place + 1])
            expected = reference[str(sample_id)]
            targets = torch.tensor(batch[sample_id].tokens)[1:, None]
            wanted = expected.log_softmax(-1)[:-1].gather(1, targets)[:, 0]
            difference = (logprobs[number][rows][:-1] - wanted).abs()
            found["logprobs"][str(sample_id)] = float(torch.cat([difference, torch.zeros(1)]).max())
            if logits:
                found["logits"][str(sample_id)] = float((logits[number][rows] - expected).abs().max())
    return found


def whole_vocabulary(logits_TV: torch.Tensor, model: Any) -> torch.Tensor:
    tp = model.groups.attn.tp
    parts = [torch.empty_like(logits_TV) for _ in range(tp.size())]
    torch.distributed.all_gather(parts, logits_TV.contiguous(), group=tp)
    return torch.cat(parts, dim=-1)[:, : model.config.vocab_size]


@pytest.fixture(scope="module")
def compared(world: World, toys: Path) -> Runs:
    return Runs(world, compare, toys, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_those_of_transformers(compared: Runs, case: Case) -> None:
    ranks = compared(case)
    worst = {what: max(max(rank[what].values(), default=0.0) for rank in ranks) for what in ranks[0]}
    print(f"{case}: largest difference of logits {worst['logits']:.1e}, logprobs {worst['logprobs']:.1e}")
    everything = {str(number) for number in range(len(LENGTHS))}
    assert {sample for rank in ranks for sample in rank["logits"]} == everything
    assert {sample for rank in ranks for sample in rank["logprobs"]} == everything
    assert worst["logits"] < TOLERANCE and worst["logprobs"] < TOLERANCE


OWN_CASES = (
    Case(spec="megatron:(attn:t2|ffn:e2)", size=2, toy="own"),
    Case(spec="megatron:(attn:d2|ffn:t2)", size=2, toy="own"),
    Case(spec="megatron:p2", size=2, toy="own"),
)


def own_weights(config: Any) -> tuple[Any, ...]:
    """As Qwen3-MoE, but all experts of a layer in one tensor, gate and up rows in turn, transposed."""
    from mtrl.models.boxes import Place
    from mtrl.models.families import Weight, qwen3

    mlp = "model.layers.{layer}.mlp.experts."
    fused: dict[str, Any] = {
        "expert.gate": Place(name=mlp + "gate_up", pattern="e h (j u)", within=(("u", 0, 2),)),
        "expert.up": Place(name=mlp + "gate_up", pattern="e h (j u)", within=(("u", 1, 2),)),
        "expert.down": Place(name=mlp + "down", pattern="e j h"),
    }
    return tuple(
        Weight(role=row.role, place=fused.get(row.role, row.place), layers=row.layers)
        for row in qwen3.weights(config)
    )


def write_own(toys: Path, layers: int, experts: int) -> None:
    """The toy "moe" as a checkpoint of the user's own family."""
    own = toys / "own"
    shutil.copytree(toys / "moe", own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    tensors = load_file(own / "model.safetensors")
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{e}.{half}_proj.weight").T for e in range(experts)])
            for half in ("gate", "up", "down")
        )
        tensors[prefix + "gate_up"] = torch.stack([gate, up], dim=-1).flatten(2).contiguous()
        tensors[prefix + "down"] = down.contiguous()
    save_file(tensors, own / "model.safetensors")


def compare_own(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """What `compare` finds of a family that only this process knows; and its export."""
    from dataclasses import replace

    from mtrl.models.families import Family, qwen3, register_family
    from mtrl.models.hf import export_hf

    register_family(
        Family(
            name="own",
            architectures=("OwnForCausalLM",),
            read_config=lambda hf: replace(qwen3.read_moe(hf), family="own"),
            weights=own_weights,
        )
    )
    found = {}
    reference = load_file(Path(folder) / "own" / "logits.reference")
    for groups, num_chunks, toy, name in each_case(cases):
        model = load_toy(groups, num_chunks, Path(folder) / toy)
        export_hf(model, Path(folder) / "own exported" / name)
        found[name] = differences(model, reference)
    return found


def test_a_family_of_the_users_own_with_fused_experts_needs_a_table_alone(world: World, toys: Path) -> None:
    write_own(toys, layers=4, experts=8)
    runs = Runs(world, compare_own, toys, OWN_CASES)
    expected = load_file(toys / "own" / "model.safetensors")
    for case in OWN_CASES:
        assert max(max(rank["logprobs"].values()) for rank in runs(case)) < TOLERANCE
        found = load_file(toys / "own exported" / str(case) / "model.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
