"""Every family computes transformers' logits, and gives back the folder that it read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import FAMILY_TOYS, build_family_toy, save

LENGTHS = [9, 17, 2, 30]
TOLERANCE = 1e-5  # float32, logits of size 1 to 5; the largest seen is 1.6e-6


def tokens() -> torch.Tensor:
    return torch.randint(101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def run_each(folder: str) -> dict[str, dict[str, object]]:
    """On the one rank, by toy: the largest difference of a logit, and whether the export is the folder
    read.
    """
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import export_hf, load_hf
    from mtrl.models.packed import PackedSegments

    found: dict[str, dict[str, object]] = {}
    segments = PackedSegments.from_lengths(LENGTHS, torch.device("cpu"))
    for groups, _, toy, name in each_case([["megatron:d1", 1, toy, toy] for toy in FAMILY_TOYS]):
        path = Path(folder) / toy
        model = build_model(load_model_config(path), groups)
        load_hf(model, path)
        assert segments.positions_T is not None
        with torch.no_grad():
            logits = model.chunks[0].eval()(
                tokens()[None], segments.positions_T[None], None, packed_seq_params=segments
            )
        expected = load_file(path / "logits.reference")["logits"]
        export_hf(model, path / "again")
        before, after = (load_file(each / "model.safetensors") for each in (path, path / "again"))
        found[name] = {
            "difference": float((logits[0, :, : expected.shape[-1]] - expected).abs().max()),
            "same": before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before),
        }
    return found


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What the rank found, by toy."""
    folder = tmp_path_factory.mktemp("toys")
    for toy in FAMILY_TOYS:
        model = build_family_toy(toy, seed=3)
        save(model, folder / toy)
        with torch.no_grad():
            logits = torch.cat([model(part[None]).logits[0] for part in tokens().split(LENGTHS)])
        save_file({"logits": logits}, folder / toy / "logits.reference")
    by_rank: list[dict[str, dict[str, object]]] = world.run(run_each, {"folder": str(folder)}, size=1)
    return by_rank[0]


@pytest.mark.parametrize("toy", FAMILY_TOYS)
def test_packed_samples_give_transformers_logits(found: dict[str, dict[str, object]], toy: str) -> None:
    print(f"{toy}: {found[toy]['difference']:.1e}")
    assert float(str(found[toy]["difference"])) < TOLERANCE


@pytest.mark.parametrize("toy", FAMILY_TOYS)
def test_the_export_is_the_folder_that_was_read(found: dict[str, dict[str, object]], toy: str) -> None:
    assert found[toy]["same"] is True
