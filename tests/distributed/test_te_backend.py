"""The backend of Transformer Engine, without its kernels: Megatron's real extension over a plain torch
reference of Transformer Engine's modules (tests/te_reference), on CPU ranks of their own.

What holds here is everything but the kernels: which modules a layer has, where each role's weight lies in
them, what is communicated over which group, which marks the optimizer reads. docs/decisions/0012 says why.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.parity import Errors, Measured, Pair
from tests.distributed.selected import selected
from tests.distributed.test_logits import LENGTHS, TOLERANCE, differences
from tests.distributed.test_recompute import TOYS as RECOMPUTED
from tests.distributed.test_recompute import train, ways_of
from tests.distributed.toy_runs import batch, each_case, load_toy, microbatches, samples
from tests.distributed.world import World
from tests.family_toys import FAMILY_TOYS, build_family_toy, save

REFUSED = {"gpt oss": "attention sinks, sliding windows"}
FAMILIES = tuple(toy for toy in FAMILY_TOYS if toy not in REFUSED)
FUSED = "qwen3 moe"
FOLDED = "megatron:(attn:t2|ffn:e2)"
# Latent norms' epsilon is not the config's: apart from the usual 1e-6 that shows.
NORM_EPS = {"deepseek v3": 1e-2, "moonlight": 1e-2}


def pairs(*rows: tuple[str, str]) -> tuple[Pair, ...]:
    return tuple(
        Pair(spec=f"megatron:{spec}", toy=toy, backend="transformer_engine") for spec, toys in rows
        for toy in toys.split(", ")
    )  # fmt: skip


QUICK = pairs(
    ("t2", "qwen3"),
    ("c2", "qwen3 moe"),
    ("(attn:t2|ffn:e2)", "deepseek v3"),
)
LONG = (
    Pair(spec="megatron:p2", toy="qwen3 moe", num_chunks=2, backend="transformer_engine"),
    *pairs(
        ("d1", "qwen3, qwen3 moe, deepseek v3"),
        ("t2", "qwen2, qwen3 moe, olmoe, deepseek v3, moonlight"),
        ("c2", "qwen3, deepseek v3, glm4 moe"),
        ("p2", "qwen3, qwen3 moe, deepseek v3"),
        ("(attn:d2|ffn:e2)", "qwen3 moe, deepseek v3"),
        ("(attn:t2|ffn:e2)", "qwen3 moe, qwen2 moe"),
        # Experts over etp, other than attention's tp: with ep 1 Megatron 0.16 reduces them over wrong groups.
        ("(attn:d2|ffn:t2)", "qwen3 moe, mixtral"),
        ("(attn:t2c2|ffn:e4)", "qwen3 moe, deepseek v3"),
        ("(attn:d2t2|ffn:t2e2)", "qwen3 moe"),
        ("(attn:p2t2|ffn:e2)", "deepseek v3"),
    ),
)
PAIRS = [*QUICK, *(pytest.param(pair, marks=pytest.mark.slow) for pair in LONG)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family's toy, with transformers' logits of every sample beside it."""
    folder = tmp_path_factory.mktemp("toys")
    for toy in FAMILY_TOYS:
        fields = {"rms_norm_eps": NORM_EPS[toy]} if toy in NORM_EPS else {}
        model = build_family_toy(toy, seed=5, **fields)
        save(model, folder / toy)
        if toy == FUSED:
            save(model, folder / f"{toy} fused", save_original_format=False)
        with torch.no_grad():
            logits = {
                str(sample.sample_id): model(torch.tensor([sample.tokens])).logits[0]
                for sample in samples(LENGTHS, seed=3)
            }
        save_file(logits, folder / toy / "logits.reference")
    return folder


def compare(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """By case: the largest difference of logits and of log-probabilities from transformers', this rank's
    parameters and state that is none; the weights are exported to ``folder/out/case``.
    """
    from mtrl.models.hf import export_hf

    found = {}
    for groups, _, toy, name in each_case(cases):
        model = load_toy(groups, 1, Path(folder) / toy, backend="transformer_engine")
        export_hf(model, Path(folder) / "out" / name)
        reference = load_file(Path(folder) / toy / "logits.reference")
        worst = {
            what: max(each.values(), default=0.0) for what, each in differences(model, reference).items()
        }
        names = {key for chunk in model.chunks for key in chunk.state_dict()}
        parameters = {name: list(each.shape) for (_, name), each in model.parameters().items()}
        extra = sorted(key for key in names if "_extra_state" in key)
        found[name] = worst | {"parameters": parameters, "extra_state": extra}
    return found


@pytest.fixture(scope="module")
def compared(te_world: World, toys: Path) -> dict[str, Any]:
    cases = [["megatron:d1", 1, toy, toy] for toy in FAMILIES]
    found: dict[str, Any] = te_world.run(compare, {"folder": str(toys), "cases": cases}, size=1)[0]
    return found


@pytest.mark.parametrize("toy", FAMILIES)
def test_logits_equal_those_of_transformers(compared: dict[str, Any], toy: str) -> None:
    print(f"{toy}: {compared[toy]['logits']:.1e}, {compared[toy]['logprobs']:.1e}")
    assert compared[toy]["logits"] < TOLERANCE and compared[toy]["logprobs"] < TOLERANCE


@pytest.mark.parametrize("toy", FAMILIES)
def test_what_was_loaded_is_exported_bit_by_bit(compared: dict[str, Any], toys: Path, toy: str) -> None:
    expected = load_file(toys / toy / "model.safetensors")
    found = load_file(toys / "out" / toy / "model.safetensors")
    assert set(found) == set(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def read_fused(folder: str) -> None:
    """Load a folder whose experts are one tensor a layer, and export it to ``folder/out/fused``."""
    from mtrl.models.hf import export_hf

    for groups, *_ in each_case([[FOLDED, 1, FUSED, "fused"]]):
        model = load_toy(groups, 1, Path(folder) / f"{FUSED} fused", backend="transformer_engine")
        export_hf(model, Path(folder) / "out" / "fused")


def test_experts_of_one_tensor_are_read_too(te_world: World, toys: Path) -> None:
    te_world.run(read_fused, {"folder": str(toys)}, size=2)
    expected = load_file(toys / FUSED / "model.safetensors")
    assert expected.keys() != load_file(toys / f"{FUSED} fused" / "model.safetensors").keys()
    found = load_file(toys / "out" / "fused" / "model.safetensors")
    assert set(found) == set(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("toy", FAMILIES)
def test_extra_state_is_no_weight(compared: dict[str, Any], toy: str) -> None:
    assert compared[toy]["extra_state"], "the modules keep none: the law below says nothing"
    assert not [name for name in compared[toy]["parameters"] if "_extra_state" in name]


def test_norms_lie_in_the_linears_that_megatron_fuses_them_into(compared: dict[str, Any]) -> None:
    names = compared["deepseek v3"]["parameters"]
    dense, mixture = "decoder.layers.0.", "decoder.layers.1."
    assert dense + "mlp.linear_fc1.layer_norm_weight" in names
    assert mixture + "pre_mlp_layernorm.weight" in names
    assert mixture + "mlp.linear_fc1.layer_norm_weight" not in names
    assert dense + "self_attention.linear_kv_up_proj.layer_norm_weight" in names
    assert mixture + "mlp.experts.linear_fc2.weight7" in names
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in compared["qwen3"]["parameters"]


def refuse(folder: str) -> dict[str, str]:
    """What building each refused model says."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.parallel.errors import ConfigError

    found = {}
    for groups, _, toy, name in each_case([["megatron:d1", 1, toy, toy] for toy in (*REFUSED, "qwen3")]):
        try:
            build_model(
                load_model_config(Path(folder) / toy), groups, backend="transformer_engine", precision="fp64"
            )
        except ConfigError as error:
            found[name] = str(error)
    return found


def test_what_it_cannot_compute_is_refused(te_world: World, toys: Path) -> None:
    found = te_world.run(refuse, {"folder": str(toys)}, size=1)[0]
    assert found.keys() == {*REFUSED, "qwen3"}
    for toy, part in REFUSED.items():
        assert part in found[toy]
    assert "fp64" in found["qwen3"]


def test_without_transformer_engine_it_is_refused(world: World, toys: Path) -> None:
    found = world.run(refuse, {"folder": str(toys)}, size=1)[0]
    assert "Transformer Engine is not installed" in found["qwen3"]


def whole_linear() -> dict[str, Any]:
    """The mark of a shard on Megatron's own linear that every tensor parallel rank holds whole."""
    import mtrl.parallel.megatron_ready  # noqa: F401

    from megatron.core.extensions.transformer_engine import TELinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True
    )
    linear = TELinear(
        8, 8, parallel_mode="duplicated", config=config, init_method=torch.nn.init.ones_, bias=False,
        skip_bias_add=False, skip_weight_param_allocation=False,
    )  # fmt: skip
    return {"is_shard": linear.weight.tensor_model_parallel}


def test_megatron_0_16_alone_marks_whole_weights_as_shards(te_world: World) -> None:
    # Where this fails, `LatentAttention` need not take the marks back.
    from mtrl.parallel.megatron_ready import MEGATRON_0_19

    assert te_world.run(whole_linear, size=1)[0] == {"is_shard": not MEGATRON_0_19}


FP8_SPEC = "megatron:t2"


def fp8_fields(folder: str) -> dict[str, Any]:
    """Megatron's config of a model whose linears are asked to run in FP8."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.precision import Fp8

    config = load_model_config(Path(folder) / "qwen3")
    found = {}
    for groups, *_ in each_case([[FP8_SPEC, 1, "qwen3", "qwen3"]]):
        for recipe, first in (("fp8_blockwise", 1), ("fp8_delayed", 0), ("mxfp8", 0)):
            fp8 = Fp8(recipe=recipe, gradients="e5m2", bf16_first_layers=first)
            model = build_model(config, groups, precision="bf16", fp8=fp8, backend="transformer_engine")
            own: Any = model.transformer_config
            found[recipe] = [
                own.fp8, own.fp8_recipe, own.first_last_layers_bf16, own.num_layers_at_start_in_bf16,
                own.num_layers_at_end_in_bf16, own.params_dtype == torch.bfloat16,
            ]  # fmt: skip
            rows = [microbatches(model, batch(number)) for number in range(3)]
            shares = {each.packed.tokens_T.numel() // groups.attn.tp.size() for row in rows for each in row}
            found[f"{recipe} shares"] = sorted(shares)
    return found


def test_fp8_is_asked_by_megatrons_names_over_rows_that_it_takes(te_world: World, toys: Path) -> None:
    found = te_world.run(fp8_fields, {"folder": str(toys)}, size=2)[0]
    multiples = {"fp8_blockwise": 16, "fp8_delayed": 16, "mxfp8": 32}
    for recipe, multiple in multiples.items():
        assert all(share % multiple == 0 for share in found.pop(f"{recipe} shares"))
    assert found == {
        "fp8_blockwise": ["hybrid", "blockwise", True, 1, 0, True],
        "fp8_delayed": ["hybrid", "delayed", False, 0, 0, True],
        "mxfp8": ["hybrid", "mxfp8", False, 0, 0, True],
    }


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, te_world: World, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    return Measured(te_world, tmp_path_factory.mktemp("parity"), selected(request, "pair"))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_three_steps_give_the_numbers_of_transformers(measured: Measured, pair: Pair) -> None:
    errors = measured(pair)
    print(f"{pair}: {errors}")
    nothing = Errors(loss=0.0, grad_norm=0.0, gradient=0.0, weights=0.0)
    assert not errors.beyond(nothing), errors


@pytest.fixture(scope="module")
def recomputed(te_world: World, toys: Path) -> dict[str, Any]:
    arguments = {"folder": str(toys), "specs": [FOLDED], "backend": "transformer_engine"}
    found: dict[str, Any] = te_world.run(train, arguments, size=2, timeout_s=400.0)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("toy", "way"), [(toy, way) for toy in RECOMPUTED for way in ways_of(toy, FOLDED) if way != "none"]
)
def test_recomputing_changes_rounding_alone(recomputed: dict[str, Any], toy: str, way: str) -> None:
    found, expected = recomputed[f"{FOLDED} {toy} {way}"], recomputed[f"{FOLDED} {toy} none"]
    assert expected["checkpoints"] == 0 < found["checkpoints"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    pairs = [(value, expected["weights"][key]) for key, value in found["weights"].items()]
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs) < 1e-6
