"""The backend of Transformer Engine, without its kernels: Megatron's real extension over a plain torch
reference of Transformer Engine's modules (tests/te_reference), on CPU ranks of their own.

What holds here is everything but the kernels: which modules a layer has, where each role's weight lies in
them, what is communicated over which group, which marks the optimizer reads. docs/decisions/0012 says why.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.distributed.checkpoint_runs import digest, newest, open_run, restore
from tests.distributed.checkpoint_runs import save as save_run
from tests.distributed.parity import Errors, Pair, measure, write_reference
from tests.distributed.test_logits import LENGTHS, TOLERANCE, differences
from tests.distributed.toy_runs import each_case, samples
from tests.distributed.world import World
from tests.family_toys import FAMILY_TOYS, build_family_toy, save

REFERENCE = Path(__file__).resolve().parents[1] / "te_reference"
REFUSED = {"gpt oss": "attention sinks, sliding windows"}
FAMILIES = tuple(toy for toy in FAMILY_TOYS if toy not in REFUSED)
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
LONG = pairs(
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
)
PAIRS = [*QUICK, *(pytest.param(pair, marks=pytest.mark.slow) for pair in LONG)]


@pytest.fixture(scope="module")
def te_world() -> Iterator[World]:
    """Ranks that find the reference as ``transformer_engine``."""
    world = World(path=(REFERENCE,))
    yield world
    world.close()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family's toy, with transformers' logits of every sample beside it."""
    folder = tmp_path_factory.mktemp("toys")
    for toy in FAMILY_TOYS:
        fields = {"rms_norm_eps": NORM_EPS[toy]} if toy in NORM_EPS else {}
        model = build_family_toy(toy, seed=5, **fields)
        save(model, folder / toy)
        with torch.no_grad():
            logits = {
                str(sample.sample_id): model(torch.tensor([sample.tokens])).logits[0]
                for sample in samples(LENGTHS, seed=3)
            }
        save_file(logits, folder / toy / "logits.reference")
    return folder


def load(groups: Any, path: Path, backend: Any, precision: Any = "fp32") -> Any:
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf

    model = build_model(load_model_config(path), groups, backend=backend, precision=precision)
    load_hf(model, path)
    return model


def compare(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """By case: the largest difference of logits and of log-probabilities from transformers', this rank's
    parameters and state that is none; the weights are exported to ``folder/out/case``.
    """
    from mtrl.models.hf import export_hf

    found = {}
    for groups, _, toy, name in each_case(cases):
        model = load(groups, Path(folder) / toy, "transformer_engine")
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


class Measured:
    """Errors of pairs; those of one world size run together, the first time one of them is asked for."""

    def __init__(self, world: World, folder: Path, chosen: list[Pair]) -> None:
        self.world, self.folder, self.chosen = world, folder, chosen
        self._found: dict[Pair, Errors | str] = {}

    def __call__(self, pair: Pair) -> Errors:
        if pair not in self._found:
            same_size = [each for each in self.chosen if each.size == pair.size]
            for toy in {each.toy for each in same_size}:
                if not (self.folder / toy).exists():
                    write_reference(self.folder, toy)
            found = measure(self.world, self.folder, same_size)
            self._found.update(zip(same_size, found, strict=True))
        errors = self._found[pair]
        assert isinstance(errors, Errors), errors
        return errors


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, te_world: World, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    own = [each.params["pair"] for each in chosen if each is not None and "pair" in each.params]
    own = [each for each in own if each.backend == "transformer_engine"]
    return Measured(te_world, tmp_path_factory.mktemp("parity"), own)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_three_steps_give_the_numbers_of_transformers(measured: Measured, pair: Pair) -> None:
    errors = measured(pair)
    print(f"{pair}: {errors}")
    nothing = Errors(loss=0.0, grad_norm=0.0, gradient=0.0, weights=0.0)
    assert not errors.beyond(nothing), errors


def exchange(folder: str, toys: list[str]) -> dict[str, Any]:
    """By toy and direction: what differs between a checkpoint of one backend and what the other writes of it;
    moments are no two alike. In bf16, where masters are not the weights.
    """
    from mtrl.checkpoint.optimizer_state import OptimizerState

    found: dict[str, Any] = {}
    ways = [("torch_native", "transformer_engine"), ("transformer_engine", "torch_native")]
    for groups, _, toy, _ in each_case([["megatron:(attn:t2|ffn:e2)", 1, toy, toy] for toy in toys]):
        path = Path(folder) / toy
        for writer, reader in ways:
            out = Path(folder) / f"{toy} of {writer}"
            trainer = open_run(load(groups, path, writer, "bf16"), distributed=True)
            for shard in OptimizerState.of(trainer.model, trainer.optimizer).shards:
                for tensor in shard.tensors().values():
                    tensor.copy_(torch.arange(tensor.numel()) + 1000 * shard.start)
            save_run(trainer, out, path, 1)
            again = open_run(load(groups, newest(out), reader, "bf16"), distributed=True)
            restore(again, out)
            save_run(again, out / "again", path, 1)
            if dist.get_rank() == 0:
                before, after = digest(out / "step_000001"), digest(out / "again" / "step_000001")
                differ = [name for name in {*before, *after} if before.get(name) != after.get(name)]
                kinds = sorted({name.split(" ")[0] for name in before if " " in name})
                found[f"{toy}: {writer}"] = {"differ": differ, "kinds": kinds}
            dist.barrier()
    return found


def test_a_checkpoint_of_one_backend_opens_under_the_other_bit_by_bit(te_world: World, toys: Path) -> None:
    arguments = {"folder": str(toys), "toys": ["deepseek v3"]}
    found = te_world.run(exchange, arguments, size=2)[0]
    assert len(found) == 2
    for way, result in found.items():
        assert result == {"differ": [], "kinds": ["exp_avg", "exp_avg_sq", "master"]}, way
