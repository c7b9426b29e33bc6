"""A run that was stopped and resumed is the run that never stopped: bit by bit, or under another layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_runs import digest, load, open_run, own_tensors, restore, resume, save, step
from tests.distributed.selected import selected
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
# Without masters: the distributed optimizer, Megatron's plain one, a virtual pipeline, all axes at once.
IN_FLOAT32 = [f"{LAYOUTS[number]} fp32" for number in (1, 2, 3, 7)]
NAMES = [*(f"{layout} bf16" for layout in LAYOUTS), *IN_FLOAT32]
ON_BOTH_STACKS = (NAMES[1], NAMES[3], IN_FLOAT32[1])
OPENED = [name for name in NAMES if name.endswith("bf16") or name in (IN_FLOAT32[0], IN_FLOAT32[-1])]


def rows_of(layouts: Sequence[Layout], size: int) -> list[list[Any]]:
    """Those of a world size, as a rank's function takes them."""
    return [
        [each.spec, each.num_chunks, each.distributed, str(each)] for each in layouts if each.size == size
    ]


def on_all_ranks(
    world: World, function: Callable[..., object], layouts: Sequence[Layout], **arguments: object
) -> list[dict[str, Any]]:
    """What each rank of each world size found."""
    return [
        rank
        for size in sorted({layout.size for layout in layouts})
        for rank in world.run(
            function, {**arguments, "layouts": rows_of(layouts, size)}, size=size, timeout_s=300.0
        )
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoints")
    write_toys(found)
    return found


def train_and_save(folder: str, names: list[str], layouts: list[list[Any]]) -> dict[str, Any]:
    """Per layout and precision: two steps, a checkpoint, one step more; again from the checkpoint."""
    found = {}
    for spec, num_chunks, distributed, name in layouts:
        for groups, _, _, _ in each_case([[spec, num_chunks, TOY, name]]):
            for precision in [each for each in ("fp32", "bf16") if f"{name} {each}" in names]:
                path, out = Path(folder) / TOY, Path(folder) / f"{name} {precision}"
                trainer = open_run(load(groups, num_chunks, path, precision), distributed=distributed)
                for number in range(2):
                    step(trainer, number)
                save(trainer, out, path, 2)
                again = resume(groups, num_chunks, out, distributed=distributed, precision=precision)
                numbers = [step(each, 2) for each in (trainer, again)]
                straight, resumed = own_tensors(trainer), own_tensors(again)
                found[f"{name} {precision}"] = {
                    "straight": numbers[0],
                    "resumed": numbers[1],
                    "num_tensors": len(straight),
                    "differ": [key for key in straight if not torch.equal(straight[key], resumed[key])],
                    "digest": digest(out / "step_000002") if dist.get_rank() == 0 else {},
                }
    return found


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, world: World, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every rank found, by layout and precision, of those asked for; the checkpoints stay."""
    opened = OPENED if selected(request, "source") else []
    names = list(dict.fromkeys([*selected(request, "name"), *opened]))
    layouts = [each for each in LAYOUTS if {f"{each} fp32", f"{each} bf16"} & set(names)]
    ranks = on_all_ranks(world, train_and_save, layouts, folder=str(folder), names=names)
    return {name: [rank[name] for rank in ranks if name in rank] for name in names}


def marked(name: str) -> Any:
    return pytest.param(name, marks=[] if name in ON_BOTH_STACKS else pytest.mark.one_stack)


@pytest.mark.parametrize("name", [marked(name) for name in NAMES])
def test_a_resumed_run_is_the_one_that_never_stopped(
    saved: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank in saved[name]:
        assert rank["resumed"] == rank["straight"]
        assert rank["num_tensors"] > 0 and rank["differ"] == []


def reshard(folder: str, names: list[str], layouts: list[list[Any]]) -> dict[str, Any]:
    """On rank 0, per checkpoint and layout of this world: what it holds when loaded and saved again."""
    found = {}
    for spec, num_chunks, distributed, name in layouts:
        for groups, _, _, _ in each_case([[spec, num_chunks, TOY, name]]):
            for precision in ("fp32", "bf16"):
                model = load(groups, num_chunks, Path(folder) / TOY, precision)
                trainer = open_run(model, distributed=distributed)
                for source in [each for each in names if each.endswith(precision)]:
                    for tensor in own_tensors(trainer).values():
                        tensor.fill_(float("nan"))  # what is not restored is seen
                    restore(trainer, Path(folder) / source)
                    out = Path(folder) / f"{source} as {name}"
                    save(trainer, out, Path(folder) / TOY, 2)
                    if dist.get_rank() == 0:
                        found[f"{source} as {name}"] = digest(out / "step_000002")
    return found


@pytest.fixture(scope="module")
def resharded(world: World, folder: Path, saved: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What differs, by checkpoint and layout."""
    found: dict[str, Any] = {}
    for rank in on_all_ranks(world, reshard, LAYOUTS, folder=str(folder), names=OPENED):
        for name, after in rank.items():
            before = saved[name.split(" as ")[0]][0]["digest"]
            found[name] = [key for key in before if before[key] != after.get(key)]
            assert before
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
@pytest.mark.parametrize("source", [name for name in OPENED if name.endswith("fp32")])
def test_so_it_is_without_masters(resharded: dict[str, Any], source: str, target: Layout) -> None:
    assert resharded[f"{source} as {target}"] == []
