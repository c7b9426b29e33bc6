"""FP8 under the backend of Transformer Engine, over the reference: Megatron's contexts, recipes and padding.

In blocks the reference multiplies with torch_native's arithmetic, so both backends must take the same step:
what is compared is which linears are in FP8, with which format, over which tokens. The other two recipes are
Transformer Engine's alone; they are compared with bf16, by the size of what they change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mtrl.models.precision import Fp8
from mtrl.parallel.spec import parse_training_spec
from tests.distributed.router_runs import whole_weights
from tests.distributed.test_fp8_layouts import LOSS, LR, SIZES, UPDATE, Found, distance, samples
from tests.distributed.toy_runs import each_case, load_toy, open_trainer
from tests.distributed.world import World
from tests.family_toys import build_family_toy, published, save
from tests.toys import build_toy, write_weights

ALONE, SHARED = "megatron:d1", "megatron:(attn:d2|ffn:e2)"
WAYS: dict[str, Fp8 | None] = {
    "none": None,
    "e4m3": Fp8(),
    "e5m2": Fp8(gradients="e5m2"),
    "ends in bf16": Fp8(bf16_first_layers=1, bf16_last_layers=1),
    "delayed": Fp8(recipe="fp8_delayed", gradients="e5m2"),
    "mxfp8": Fp8(recipe="mxfp8"),
    "mxfp8 e5m2": Fp8(recipe="mxfp8", gradients="e5m2"),
}
RECOMPUTED = {"full": ("full", []), "modules": ("selective", ["layernorm", "moe", "core_attn"])}
BLOCKS = ("e4m3", "e5m2", "ends in bf16")
NUM_STEPS = 6
FAMILIES: dict[str, dict[str, int]] = {
    # Latent attention, its down projections too.
    "deepseek v3": {
        "hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    # A shared expert with a gate, biases of queries, keys and values.
    "qwen2 moe": {
        "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64,
        "shared_expert_intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_weights(build_toy("moe", seed=5, **SIZES), folder / "toy")
    for name, sizes in FAMILIES.items():
        save(build_family_toy(name, seed=5, **sizes), folder / name)
    return folder


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens each expert of this rank was given, by call."""
    counts: list[int] = []
    paddings = [
        module.quantization_padding
        for chunk in model.chunks
        for module in chunk.modules()
        if hasattr(module, "quantization_padding")
    ]
    hooks = [each.register_forward_pre_hook(lambda _, args: counts.extend(args[1])) for each in paddings]
    yield counts
    for hook in hooks:
        hook.remove()


def train(
    folder: str,
    cases: list[list[Any]],
    backends: list[str],
    precision: str,
    steps: int,
    recompute: str = "",
    family: str = "toy",
) -> Found:
    """On a rank: losses and gradient norms of the steps, weights after the first, tokens of experts."""
    from mtrl.models.megatron_config import recompute_fields
    from mtrl.objectives import SftLoss
    from mtrl.policy import make_microbatches

    found: Found = {}
    for groups, _, way, _ in each_case(cases):
        for backend in backends:
            options = {"fp8": WAYS[way], "precision": precision, "backend": backend}
            if recompute:
                options |= recompute_fields(*RECOMPUTED[recompute])
            model = load_toy(groups, 1, Path(folder) / family, **options)
            trainer = open_trainer(model, distributed=False, lr=LR)
            rows = make_microbatches(samples(), model, max_tokens=64, pad_token_id=0)
            with counted(model) as counts:
                taken = [trainer.step(rows, SftLoss())]
            weights = whole_weights(model)
            taken += [trainer.step(rows, SftLoss()) for _ in range(steps - 1)]
            found[f"{backend} {way}"] = {
                "losses": [step.loss for step in taken],
                "grad_norms": [step.grad_norm for step in taken],
                "weights": weights,
                "counts": counts,
            }
    return found


def run(world: World, toy: Path, *, spec: str, ways: list[str], **arguments: Any) -> list[Found]:
    cases = [[spec, 1, way, way] for way in ways]
    size = parse_training_spec(spec).world_size
    return world.run(train, {"folder": str(toy), "cases": cases, **arguments}, size=size, timeout_s=240.0)


BOTH = {"backends": ["torch_native", "transformer_engine"], "precision": "fp32", "steps": 1}


@pytest.fixture(scope="module")
def alone(te_world: World, toy: Path) -> Found:
    return run(te_world, toy, spec=ALONE, ways=["none", *BLOCKS], **BOTH)[0]


@pytest.fixture(scope="module")
def shared(te_world: World, toy: Path) -> list[Found]:
    return run(te_world, toy, spec=SHARED, ways=["e4m3"], **BOTH)


@pytest.fixture(scope="module")
def start() -> Any:
    return published(build_toy("moe", seed=5, **SIZES))


def pair(found: Found, way: str) -> tuple[Found, Found]:
    return found[f"transformer_engine {way}"], found[f"torch_native {way}"]


def same_step(theirs: Found, ours: Found, start: Any) -> None:
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=LOSS)
    far = distance(theirs, ours, start)
    print(f"losses {theirs['losses']} {ours['losses']}, updates within {far:.1e}")
    assert far < UPDATE


@pytest.mark.parametrize("way", BLOCKS)
def test_a_step_in_blocks_is_that_of_torch_native(alone: Found, start: Any, way: str) -> None:
    same_step(*pair(alone, way), start)


def test_ways_differ_by_more_than_backends_do(alone: Found, start: Any) -> None:
    steps = {way: pair(alone, way)[0] for way in ("none", *BLOCKS)}
    far = {way: distance(steps[way], steps["none"], start) for way in BLOCKS}
    assert 10 * UPDATE < far["ends in bf16"] < far["e4m3"] < far["e5m2"]


def test_tokens_of_experts_are_padded_and_the_step_stays(shared: list[Found], start: Any) -> None:
    counts = [count for rank in shared for count in pair(rank, "e4m3")[0]["counts"]]
    assert [count for count in counts if count % 16], counts
    same_step(*pair(shared[0], "e4m3"), start)


@pytest.mark.parametrize(
    ("spec", "way"),
    [("megatron:p2", "ends in bf16"), pytest.param("megatron:t2", "e4m3", marks=pytest.mark.one_stack)],
)
def test_a_step_over_stages_and_cut_linears_is_that_of_torch_native(
    te_world: World, toy: Path, start: Any, spec: str, way: str
) -> None:
    same_step(*pair(run(te_world, toy, spec=spec, ways=[way], **BOTH)[0], way), start)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_other_linears_is_that_of_torch_native(te_world: World, toy: Path, family: str) -> None:
    found = run(te_world, toy, spec=ALONE, ways=["e4m3"], family=family, **BOTH)[0]
    before = load_file(toy / family / "model.safetensors")
    still = [name for name in before if name.endswith("e_score_correction_bias")]
    for weights in (before, *(each["weights"] for each in found.values())):
        for name in still:
            del weights[name]
    same_step(*pair(found, "e4m3"), before)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputing_in_blocks_changes_rounding_alone(
    te_world: World, toy: Path, shared: list[Found], start: Any, recompute: str
) -> None:
    options = BOTH | {"backends": ["transformer_engine"], "recompute": recompute}
    again = run(te_world, toy, spec=SHARED, ways=["e4m3"], **options)[0]["transformer_engine e4m3"]
    kept = pair(shared[0], "e4m3")[0]
    assert len(again["counts"]) > len(kept["counts"])
    same_step(again, kept, start)


# Measured: 1.8 % off in blocks and 1.7 % in mxfp8 at the second step, 2.6 % delayed at the third, and 1.2 to
# 1.3 % at the last. Half as much again for other processors' bf16.
OFF = {"e4m3": 0.03, "delayed": 0.04, "mxfp8": 0.03}


@pytest.fixture(scope="module")
def followed(te_world: World, toy: Path) -> list[Found]:
    options = {"backends": ["transformer_engine"], "precision": "bf16", "steps": NUM_STEPS}
    return run(te_world, toy, spec=SHARED, ways=["none", *OFF, "mxfp8 e5m2"], **options)


@pytest.mark.parametrize("way", OFF)
def test_every_recipe_trains_as_bf16_does_within_its_error(followed: list[Found], way: str) -> None:
    found, exact = (followed[0][f"transformer_engine {each}"]["losses"] for each in (way, "none"))
    print([f"{(ours / theirs - 1) * 100:.1f} %" for ours, theirs in zip(found, exact, strict=True)])
    assert found[-1] < 0.8 * found[0]
    assert found == pytest.approx(exact, rel=OFF[way])


def test_recipes_and_formats_differ(followed: list[Found]) -> None:
    last = {way: found["losses"][-1] for way, found in followed[0].items()}
    assert len({*last.values()}) == len(last), last


def alone_products(sizes: list[int]) -> Found:
    """On a rank: errors of one linear's product, as shares of their bounds; and delayed scaling's scales."""
    from transformer_engine import pytorch as te  # type: ignore[import-not-found]
    from transformer_engine.common.recipe import (  # type: ignore[import-not-found]
        DelayedScaling,
        Format,
        MXFP8BlockScaling,
    )

    from mtrl.models.backends.torch_native.fp8 import error_bound, product_bound
    from mtrl.models.hf_folder import Blocks

    tokens, outputs, inputs = sizes
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, inputs, generator=generator).requires_grad_()
    linear = te.Linear(inputs, outputs, bias=False, params_dtype=torch.float32, device="cpu")
    with torch.no_grad():
        linear.weight.normal_(0, 0.005, generator=torch.Generator().manual_seed(9))
    exact = (x @ linear.weight.T).detach()
    blocks = Blocks(rows=1, columns=32)
    bound = product_bound(x, error_bound(x, blocks), linear.weight, error_bound(linear.weight, blocks))
    with te.fp8_autocast(enabled=True, fp8_recipe=MXFP8BlockScaling()):
        found: Found = {"mxfp8": float(((linear(x) - exact).abs() / bound).max())}
    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=1, amax_compute_algo="most_recent")
    errors = []
    for _ in range(2):
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe, fp8_group=dist.group.WORLD):
            y = linear(x)
        y.sum().backward()
        errors.append(float((y - exact).norm() / exact.norm()))
    names = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
    scales = {name: linear.fp8_meta[key].scale.tolist() for name, key in names.items()}
    return {**found, "errors": errors, "scales": scales, "largest": float(x.abs().max())}


def test_a_product_in_mxfp8_is_within_its_bound_and_delayed_scales_are_of_all_ranks(te_world: World) -> None:
    ranks = te_world.run(alone_products, {"sizes": [64, 96, 128]}, size=2)
    largest = max(rank["largest"] for rank in ranks)
    for rank in ranks:
        assert 0.01 < rank["mxfp8"] <= 1
        inputs, *_ = rank["scales"]["forward"]
        assert inputs == pytest.approx(448 / largest, rel=1e-6)
        assert rank["scales"]["backward"][0] == 57344
        # At first nothing is known of the tensors, and weights of 0.005 are among e4m3's subnormal numbers.
        assert rank["errors"][1] < 0.04 < 0.1 < rank["errors"][0] < 0.15
    assert ranks[0]["scales"] == ranks[1]["scales"]
