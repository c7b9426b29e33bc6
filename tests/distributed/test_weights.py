"""HF -> mtrl -> HF is the identity, bit by bit, under every layout; what does not match is refused whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.toy_runs import CASES, Case, Runs, each_case, load_toy, write_toys
from tests.distributed.world import World

pytestmark = pytest.mark.one_stack

SHARD_BYTES = 60_000


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    return folder


def load_and_export(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Load each toy and export it twice: in one file and in many. Returns the bytes this rank received."""
    from mtrl.models.gather import TensorGather, held_boxes
    from mtrl.models.hf import export_hf

    found = {}
    for groups, num_chunks, toy, name in each_case(cases):
        model = load_toy(groups, num_chunks, Path(folder) / toy)
        out = Path(folder) / "out" / name
        export_hf(model, out / "single")
        export_hf(model, out / "sharded", shard_bytes=SHARD_BYTES)
        everything = list(model.weight_map.hf_shapes())
        gather = TensorGather(model, [everything] * groups.layout.world_size, bucket_bytes=100_000)
        num_elements = sum(tensor.numel() for _, tensor in gather.run(torch.float32))
        held = [box for boxes in held_boxes(model.weight_map)[groups.rank].values() for box in boxes]
        lacking = num_elements - sum(box.num_elements for box in held)
        found[name] = {"received": gather.count.bytes_received, "needed": 4 * lacking}
    return found


@pytest.fixture(scope="module")
def exported(world: World, toys: Path) -> Runs:
    return Runs(world, load_and_export, toys, CASES)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        here = load_file(file)
        assert not set(tensors) & set(here), f"{file} repeats tensors"
        tensors |= here
    return tensors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_loaded_is_exported_bit_by_bit(exported: Runs, toys: Path, case: Case) -> None:
    exported(case)
    expected = load_file(toys / case.toy / "model.safetensors")
    for form in ("single", "sharded"):
        folder = toys / "out" / str(case) / form
        found = read_folder(folder)
        assert set(found) == set(expected)
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different
        before = json.loads((toys / case.toy / "config.json").read_text())
        assert json.loads((folder / "config.json").read_text()) == before | {"dtype": "float32"}
    assert [file.name for file in (folder.parent / "single").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_shards_are_as_small_as_asked_and_their_index_finds_every_tensor(
    exported: Runs, toys: Path, case: Case
) -> None:
    exported(case)
    folder = toys / "out" / str(case) / "sharded"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in folder.glob("*.safetensors")) and len(files) > 1
    total = 0
    for file in files:
        tensors = load_file(folder / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= SHARD_BYTES or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_receives_exactly_the_bytes_it_lacks(exported: Runs, case: Case) -> None:
    for rank in exported(case):
        assert rank["received"] == rank["needed"]


def test_transformers_opens_an_export(exported: Runs, toys: Path) -> None:
    import transformers

    case = next(case for case in CASES if case.size == 8)
    exported(case)
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(
        toys / "out" / str(case) / "sharded", output_loading_info=True
    )
    assert not any(problems.values())
    reference = transformers.AutoModelForCausalLM.from_pretrained(toys / case.toy)
    for (name, tensor), expected in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, expected), name


def write_refused(toys: Path, out: Path) -> dict[str, str]:
    """Folders that do not match the toy "moe tied", and the message each must give."""
    tensors = load_file(toys / "moe tied" / "model.safetensors")
    router, norm = "model.layers.1.mlp.gate.weight", "model.norm.weight"
    lacking = {name: tensor for name, tensor in tensors.items() if name != router}
    changes: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": (lacking, f"(1 problems):\n  missing: {router} (8, 48)"),
        "unknown": (tensors | {"visual.bias": torch.ones(3)}, "(1 problems):\n  unknown: visual.bias (3,)"),
        "misshaped": (
            tensors | {norm: torch.ones(47)},
            f"(1 problems):\n  shape of {norm}: (47,), config.json implies (48,)",
        ),
        "renamed": (
            lacking | {f"{router}_old": tensors[router]},
            f"(2 problems):\n  missing: {router} (8, 48)\n  unknown: {router}_old (8, 48)",
        ),
        "empty": ({"a": torch.ones(1)}, "\n  and "),
    }
    for name, (changed, _) in changes.items():
        (out / name).mkdir(parents=True)
        save_file(changed, out / name / "model.safetensors")
    (out / "no files").mkdir()
    (out / "a part is gone").mkdir()
    index = {"weight_map": {norm: "model-00001-of-00002.safetensors"}}
    (out / "a part is gone" / "model.safetensors.index.json").write_text(json.dumps(index))
    messages = {name: message for name, (_, message) in changes.items()}
    return messages | {
        "no files": "holds neither model.safetensors nor model.safetensors.index.json",
        "a part is gone": "names model-00001-of-00002.safetensors, which is missing",
    }


def load_refused(folder: str, refused: str, messages: dict[str, str]) -> None:
    """Load folders that do not match into a model that holds weights already: none may change."""
    from mtrl.models.hf import load_hf
    from mtrl.parallel.errors import ModelError, WeightError

    for groups, num_chunks, toy, _ in each_case([["megatron:t2", 1, "moe tied", ""]]):
        model = load_toy(groups, num_chunks, Path(folder) / toy)
        before = {key: parameter.detach().clone() for key, parameter in model.parameters().items()}
        for name, message in messages.items():
            with pytest.raises((ModelError, WeightError)) as raised:
                load_hf(model, Path(refused) / name)
            assert message in str(raised.value), str(raised.value)
            same = [torch.equal(parameter, before[key]) for key, parameter in model.parameters().items()]
            assert all(same), name


def test_weights_that_do_not_match_are_refused_by_name_and_nothing_is_written(
    world: World, toys: Path, tmp_path: Path
) -> None:
    messages = write_refused(toys, tmp_path)
    world.run(load_refused, {"folder": str(toys), "refused": str(tmp_path), "messages": messages}, size=2)


def convert(folder: str) -> None:
    """Weights in bf16, from scratch, and a tied checkpoint with a copy of the embedding."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import export_hf, initialize, load_hf

    for spec in ("megatron:t2", "megatron:(attn:d2|ffn:e2)", "megatron:p2"):
        for groups, num_chunks, toy, name in each_case([[spec, 1, "moe tied", spec]]):
            target = Path(folder) / name
            export_hf(load_toy(groups, num_chunks, Path(folder) / toy), target / "cast", dtype=torch.bfloat16)
            config = load_model_config(Path(folder) / toy)
            narrow = build_model(config, groups, precision="bf16")
            load_hf(narrow, Path(folder) / toy)
            export_hf(narrow, target / "bf16")
            export_hf(narrow, target / "widened", dtype=torch.float32)
            load_hf(narrow, Path(folder) / "with a copy")
            export_hf(narrow, target / "copy")
            scratch = build_model(config, groups)
            initialize(scratch, seed=5)
            export_hf(scratch, target / "scratch")


@pytest.fixture(scope="module")
def converted(world: World, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("converted")
    tensors = load_file(toys / "moe tied" / "model.safetensors")
    (out / "with a copy").mkdir()
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, out / "with a copy" / "model.safetensors")
    shutil.copytree(toys / "moe tied", out / "moe tied")
    config = json.loads((out / "moe tied" / "config.json").read_text())
    (out / "moe tied" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    world.run(convert, {"folder": str(out)}, size=2)
    return sorted(path for path in out.iterdir() if path.name.startswith("megatron"))


def test_a_narrower_dtype_is_torchs_own_rounding_and_named_in_the_config(
    converted: list[Path], toys: Path
) -> None:
    expected = load_file(toys / "moe tied" / "model.safetensors")
    for folder in converted:
        for form, dtype in (("cast", "bfloat16"), ("bf16", "bfloat16"), ("widened", "float32")):
            found = load_file(folder / form / "model.safetensors")
            rounded = {name: tensor.bfloat16() for name, tensor in expected.items()}
            assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
            assert all(torch.equal(found[name].bfloat16(), rounded[name]) for name in expected)
            config = json.loads((folder / form / "config.json").read_text())
            assert config["dtype"] == dtype and "torch_dtype" not in config


def test_a_copy_of_a_tied_embedding_is_passed_over(converted: list[Path]) -> None:
    for folder in converted:
        found = load_file(folder / "copy" / "model.safetensors")
        expected = load_file(folder / "bf16" / "model.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_from_scratch_do_not_depend_on_the_layout(converted: list[Path]) -> None:
    found = [load_file(folder / "scratch" / "model.safetensors") for folder in converted]
    for other in found[1:]:
        assert set(other) == set(found[0])
        assert all(torch.equal(other[name], found[0][name]) for name in other)
    for name, tensor in found[0].items():
        if "norm" in name:
            assert bool((tensor == 1).all())
        else:
            # initializer_range is 0.08; four standard errors of the mean and of the deviation.
            error = 4 * 0.08 / tensor.numel() ** 0.5
            assert abs(float(tensor.mean())) < error and abs(float(tensor.std()) - 0.08) < error, name
    embedding, head = found[0]["model.embed_tokens.weight"], found[0]["model.layers.0.mlp.gate.weight"]
    assert not torch.equal(embedding[:8], head)
