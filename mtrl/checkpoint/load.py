"""Find the newest whole checkpoint, and put a run back to where it stood, under any layout."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from mtrl.checkpoint.folder import check_latest, step_path, steps
from mtrl.checkpoint.format import Manifest, RunState, problems, rank_file
from mtrl.checkpoint.optimizer_state import BoxSource, OptimizerState, parse_box_name
from mtrl.checkpoint.rng import restore_rng
from mtrl.models.boxes import Box
from mtrl.models.builder import Model
from mtrl.models.durable import FileRecord
from mtrl.models.safetensors_header import read_headers
from mtrl.parallel.agreement import agree, gather_json
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import CheckpointError


def newest_whole(folder: Path, *, may_go_back: bool) -> tuple[Path, list[str]]:
    """The newest checkpoint, every byte of which was checked, and what was found wrong with newer ones.

    Collective over WORLD: ranks share the reading.

    Raises:
        CheckpointError: there is none; or the newest is damaged and ``may_go_back`` is false.
    """
    found: list[str] = []
    try:
        check_latest(folder)
    except CheckpointError as error:
        found.append(str(error))
    present, found = gather_json([steps(folder), found])[0]  # what one rank sees, for all
    whole: Path | None = None
    for step in reversed(present):
        wrong = verify(step_path(folder, step))
        if not wrong:
            whole = step_path(folder, step)
            break
        found += [f"{step_path(folder, step)}: {each}" for each in wrong]
    listed = "".join(f"\n  {each}" for each in found)
    if whole is None:
        raise CheckpointError(f"no whole checkpoint in {folder}, of {len(present)} there:{listed}")
    if found and not may_go_back:
        raise CheckpointError(
            f"checkpoints in {folder} are damaged:{listed}\nthe newest whole one is {whole.name}; write "
            "checkpoint.on_damage=previous to go on from it, which keeps the damaged ones under another name"
        )
    return whole, found


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a step's checkpoint, the same on all ranks; nothing if it is as it was written.

    Collective over WORLD: each rank reads its share of the files.
    """
    wrong = damage(checkpoint)
    try:
        step = Manifest.read(checkpoint).step
    except CheckpointError:
        return wrong
    return wrong if checkpoint.name == f"step_{step:06d}" else [f"its manifest is of step {step}", *wrong]


def damage(folder: Path) -> list[str]:
    """What differs between a folder and its manifest, as `verify` tells it. Collective over WORLD."""
    wrong: list[str] = []
    try:
        manifest = Manifest.read(folder)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        wrong += problems(folder, _share(manifest.files, rank, world_size))
    except CheckpointError as error:
        wrong.append(str(error))
    return list(dict.fromkeys(each for rank_found in gather_json(wrong) for each in rank_found))


def _share(files: Sequence[FileRecord], rank: int, world_size: int) -> list[FileRecord]:
    """About equally many bytes for each rank."""
    loads = [0] * world_size
    mine = []
    for record in sorted(files, key=lambda f: (-f.num_bytes, f.name)):
        reader = loads.index(min(loads))
        loads[reader] += record.num_bytes
        if reader == rank:
            mine.append(record)
    return mine


def restore_optimizer(model: Model, optimizer: Any, checkpoint: Path, state: RunState) -> int:
    """Fill masters, moments and step counts; how many Hugging Face tensors got theirs. Collective over WORLD.

    Raises:
        CheckpointError: the checkpoint lacks state that this run needs.
    """
    own = OptimizerState.of(model, optimizer)
    error: CheckpointError | None = None
    with _open_boxes(checkpoint) as (source, names):
        try:
            own.restore(source)
        except CheckpointError as lacking:
            error = lacking
    agree(error)
    own.set_num_steps(state.optimizer_steps)
    mine = own.boxes()
    taken = torch.tensor([name in mine for name in names], dtype=torch.int32)
    taken = taken.to(current_device().torch_device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return int(taken.sum())


@contextmanager
def _open_boxes(checkpoint: Path) -> Iterator[tuple[BoxSource, list[str]]]:
    """All stored boxes of the optimizer state, and the names of the tensors that have some."""
    where: dict[tuple[str, str], list[tuple[Box, Any]]] = {}
    with ExitStack() as stack:
        for record in Manifest.read(checkpoint).files:
            if not record.name.startswith("training/optimizer-"):
                continue
            path = checkpoint / record.name
            headers = read_headers(path)
            handle = stack.enter_context(safe_open(path, framework="pt"))
            for key, header in headers.items():
                try:
                    kind, name, box = parse_box_name(key)
                except ValueError as error:
                    raise CheckpointError(f"{path} has a tensor {key!r}, which names no box") from error
                if header.shape != box.shape or header.dtype != "F32":
                    raise CheckpointError(f"{path}: {key} is {header.dtype} of {header.shape}")
                where.setdefault((kind, name), []).append((box, handle.get_slice(key)))
        yield BoxSource(where), sorted({name for _, name in where})


def restore_generators(model: Model, checkpoint: Path, state: RunState) -> bool:
    """Put back this rank's random generators, if the layout is the one they were saved under."""
    layout = model.groups.layout
    if (str(layout.spec), layout.world_size) != (state.spec, state.world_size):
        return False
    path = checkpoint / rank_file("rng", model.groups.rank, layout.world_size)
    read_headers(path)
    with safe_open(path, framework="pt") as file:
        restore_rng({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return True
