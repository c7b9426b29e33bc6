"""A run that was stopped and resumed is the run that never stopped: bit by bit, or under another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.checkpoint_runs import digest, load, open_run, resume, save, step
from tests.distributed.toy_runs import each_case, write_toys
from tests.distributed.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout, with what else decides how state lies: virtual pipeline, the distributed optimizer."""

    spec: str
    size: int
    num_chunks: int = 1
    distributed: bool = True

    def __str__(self) -> str:
        virtual = f" v{self.num_chunks}" if self.num_chunks > 1 else ""
        return f"{self.spec.removeprefix('megatron:')}{virtual}{'' if self.distributed else ' plain'}"


LAYOUTS = (
    Layout(spec="megatron:d1", size=1),
    Layout(spec="megatron:(attn:d2|ffn:e2)", size=2),
    Layout(spec="megatron:d2", size=2, distributed=False),
    Layout(spec="megatron:p2", size=2, num_chunks=2),
    Layout(spec="megatron:(attn:t2|ffn:t2)", size=2),
    Layout(spec="megatron:(attn:d2t2|ffn:t2e2)", size=4),
    Layout(spec="megatron:c2p2", size=4, distributed=False),
    Layout(spec="megatron:(attn:d2p2t2|ffn:e4)", size=8),
)
TOY = "moe tied"
IN_FLOAT32 = [f"{LAYOUTS[number]} fp32" for number in (1, 7)]


def rows_of(size: int) -> list[list[Any]]:
    """The layouts of a world size, as a rank's function takes them."""
    return [
        [each.spec, each.num_chunks, each.distributed, str(each)] for each in LAYOUTS if each.size == size
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoints")
    write_toys(found)
    return found


def train_and_save(folder: str, layouts: list[list[Any]]) -> dict[str, Any]:
    """Per layout and precision: two steps, a checkpoint, two steps more; again from the checkpoint."""
    found = {}
    for spec, num_chunks, distributed, name in layouts:
        for groups, _, _, _ in each_case([[spec, num_chunks, TOY, name]]):
            for precision in ("fp32", "bf16"):
                path, out = Path(folder) / TOY, Path(folder) / f"{name} {precision}"
                trainer = open_run(load(groups, num_chunks, path, precision), distributed=distributed)
                for number in range(2):
                    step(trainer, number)
                save(trainer, out, path, 2)
                straight = [step(trainer, number) for number in range(2, 4)]
                save(trainer, out.with_name(out.name + " straight"), path, 4)
                again = resume(groups, num_chunks, out, distributed=distributed, precision=precision)
                resumed = [step(again, number) for number in range(2, 4)]
                save(again, out.with_name(out.name + " resumed"), path, 4)
                same = digest(out.with_name(out.name + " straight") / "step_000004") == digest(
                    out.with_name(out.name + " resumed") / "step_000004"
                )
                dist.barrier()
                found[f"{name} {precision}"] = {"straight": straight, "resumed": resumed, "same": same}
    return found


@pytest.fixture(scope="module")
def saved(world: World, folder: Path) -> dict[str, Any]:
    """What rank 0 found, by layout and precision."""
    found: dict[str, Any] = {}
    for size in sorted({layout.size for layout in LAYOUTS}):
        rows = [
            [each.spec, each.num_chunks, each.distributed, str(each)] for each in LAYOUTS if each.size == size
        ]
        arguments = {"folder": str(folder), "layouts": rows}
        found |= world.run(train_and_save, arguments, size=size, timeout_s=300.0)[0]
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_resumed_run_is_the_one_that_never_stopped(
    saved: dict[str, Any], layout: Layout, precision: str
) -> None:
    found = saved[f"{layout} {precision}"]
    assert found["resumed"] == found["straight"] and found["same"]


def reshard(folder: str, names: list[str], layouts: list[list[Any]]) -> dict[str, Any]:
    """Per layout of a checkpoint and layout of this world: is what is loaded and saved again the same?"""
    found = {}
    for spec, num_chunks, distributed, name in layouts:
        for groups, _, _, _ in each_case([[spec, num_chunks, TOY, name]]):
            for source in names:
                precision, out = source.rsplit(" ", 1)[1], Path(folder) / f"{source} as {name}"
                again = resume(
                    groups, num_chunks, Path(folder) / source, distributed=distributed, precision=precision
                )
                save(again, out, Path(folder) / TOY, 2)
                before, after = digest(Path(folder) / source / "step_000002"), digest(out / "step_000002")
                dist.barrier()
                found[f"{source} as {name}"] = [key for key in before if before[key] != after.get(key)]
    return found


@pytest.fixture(scope="module")
def resharded(world: World, folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = [name for name in saved if name.endswith("bf16") or name in IN_FLOAT32]
    for size in sorted({layout.size for layout in LAYOUTS}):
        rows = [
            [each.spec, each.num_chunks, each.distributed, str(each)] for each in LAYOUTS if each.size == size
        ]
        arguments = {"folder": str(folder), "names": names, "layouts": rows}
        found |= world.run(reshard, arguments, size=size, timeout_s=300.0)[0]
    return found


@pytest.mark.one_stack
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_any_layout_opens_any_others_checkpoint_bit_by_bit(
    resharded: dict[str, Any], source: Layout, target: Layout
) -> None:
    assert resharded[f"{source} bf16 as {target}"] == []  # with masters


@pytest.mark.one_stack
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", IN_FLOAT32)
def test_so_it_is_without_masters(resharded: dict[str, Any], source: str, target: Layout) -> None:
    assert resharded[f"{source} as {target}"] == []
