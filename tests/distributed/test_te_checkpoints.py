"""Checkpoints under the backend of Transformer Engine, over the reference: mtrl's of one backend open under
the other, and Megatron's extension saves and loads ``torch_dist`` under the names read and written here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mtrl.checkpoint.megatron_weights import TorchDistSource
from mtrl.checkpoint.megatron_write import write_torch_dist
from mtrl.models.boxes import Box
from mtrl.models.families import load_model_config
from mtrl.models.sources import SafetensorsSource
from tests.distributed.checkpoint_runs import digest, newest, open_run, restore
from tests.distributed.checkpoint_runs import save as save_run
from tests.distributed.test_torch_dist import different
from tests.distributed.toy_runs import each_case, load_toy
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save

pytestmark = pytest.mark.one_stack

SPEC = "megatron:(attn:t2|ffn:e2)"
TOYS = ("qwen2 moe", "deepseek v3", "moonlight")
METADATA = {"non_homogeneous_layers": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every toy, and its ``torch_dist`` checkpoint as written here."""
    made = tmp_path_factory.mktemp("toys")
    for toy in TOYS:
        save(build_family_toy(toy, seed=5), made / toy)
        with SafetensorsSource(made / toy) as source:
            config = load_model_config(made / toy)
            write_torch_dist(made / "ours" / toy, config, source, layers="separate")
    return made


def exchange(folder: str, toy: str) -> dict[str, Any]:
    """By writer: what differs between a checkpoint of one backend and what the other writes of it.

    Moments are no two alike; in bf16, where masters are not the weights.
    """
    from mtrl.checkpoint.optimizer_state import OptimizerState

    found: dict[str, Any] = {}
    path = Path(folder) / toy
    for groups, *_ in each_case([[SPEC, 1, toy, toy]]):
        for backends in (("torch_native", "transformer_engine"), ("transformer_engine", "torch_native")):
            writer, reader = ({"backend": backend, "precision": "bf16"} for backend in backends)
            out = Path(folder) / f"{toy} of {backends[0]}"
            trainer = open_run(load_toy(groups, 1, path, **writer), distributed=True)
            for shard in OptimizerState.of(trainer.model, trainer.optimizer).shards:
                for tensor in shard.tensors().values():
                    tensor.copy_(torch.arange(tensor.numel()) + 1000 * shard.start)
            save_run(trainer, out, path, 1)
            again = open_run(load_toy(groups, 1, newest(out), **reader), distributed=True)
            restore(again, out)
            save_run(again, out / "again", path, 1)
            if dist.get_rank() == 0:
                before, after = digest(out / "step_000001"), digest(out / "again" / "step_000001")
                found[backends[0]] = {
                    "differ": [name for name in {*before, *after} if before.get(name) != after.get(name)],
                    "kinds": sorted({name.split(" ")[0] for name in before if " " in name}),
                }
            dist.barrier()
    return found


def test_a_checkpoint_of_one_backend_opens_under_the_other_bit_by_bit(te_world: World, folder: Path) -> None:
    found = te_world.run(exchange, {"folder": str(folder), "toy": "deepseek v3"}, size=2)[0]
    assert found.keys() == {"torch_native", "transformer_engine"}
    for writer, result in found.items():
        assert result == {"differ": [], "kinds": ["exp_avg", "exp_avg_sq", "master"]}, writer


def save_and_load(folder: str) -> dict[str, list[str]]:
    """On a rank: Megatron saves each model, and loads what was written here into it; what differs then."""
    from megatron.core import dist_checkpointing

    found = {}
    for groups, _, toy, _ in each_case([[SPEC, 1, toy, toy] for toy in TOYS]):
        model = load_toy(groups, 1, Path(folder) / toy, backend="transformer_engine")
        chunk: Any = model.chunks[0]
        out = Path(folder) / "theirs" / toy
        out.mkdir(parents=True, exist_ok=True)
        state = chunk.sharded_state_dict(metadata=dict(METADATA))
        dist_checkpointing.save(state, str(out), content_metadata=dict(METADATA))
        with torch.no_grad():
            for tensor in model.tensors().values():
                tensor.fill_(7.0)
        state = {"model": chunk.sharded_state_dict(metadata=dict(METADATA))}
        loaded = dist_checkpointing.load(state, str(Path(folder) / "ours" / toy / "release"))
        chunk.load_state_dict(loaded["model"])
        found[toy] = different(model, load_file(Path(folder) / toy / "model.safetensors"))
    return found


@pytest.fixture(scope="module")
def saved(te_world: World, folder: Path) -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = te_world.run(save_and_load, {"folder": str(folder)}, size=2)
    return found


@pytest.mark.parametrize("toy", TOYS)
def test_what_megatron_saves_of_it_is_read_bit_by_bit(
    saved: list[dict[str, list[str]]], folder: Path, toy: str
) -> None:
    expected = load_file(folder / toy / "model.safetensors")
    with TorchDistSource(folder / "theirs" / toy, load_model_config(folder / toy)) as source:
        assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name, tensor in expected.items():
            assert torch.equal(source.read(name, Box.full(tensor.shape)), tensor), name


@pytest.mark.parametrize("toy", TOYS)
def test_what_is_written_here_megatron_loads_into_it_bit_by_bit(
    saved: list[dict[str, list[str]]], toy: str
) -> None:
    assert [rank[toy] for rank in saved] == [[], []]
