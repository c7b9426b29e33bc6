"""HF -> mtrl -> HF is the identity, bit by bit, under every layout; what does not match is refused whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.toy_runs import CASES, Case, Runs, each_case, load_toy, write_toys
from tests.distributed.world import World

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
