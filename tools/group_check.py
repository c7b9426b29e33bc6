"""What validate_installation.py starts on every rank: collectives on every group, checked and timed.

``torchrun --nproc-per-node N tools/group_check.py SPEC REPORT``; rank 0 writes REPORT, a list with one object
a group and collective. Every rank gives integers that tell it from others, so a result is right exactly or
wrong. Bandwidth is bytes on the wire of a ring: 2(n-1)/n of the buffer for an all-reduce, (n-1)/n for an
all-to-all and an all-gather (of the whole buffer), over the slowest rank's time.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

if not __package__:  # run as a file: import from the checkout it lies in, not from its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from mtrl.parallel import groups
from mtrl.parallel.device import current_device
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec

NUM_FLOATS = {"cpu": 1 << 18, "cuda": 1 << 26}
REPEATS = 3


def main(text: str, report: Path) -> None:
    """Check every group of a layout. Collective over WORLD."""
    groups.init_distributed(timeout_s=120.0)
    layout = RankLayout.from_spec(parse_training_spec(text))
    made = groups.create(layout)
    results = [
        measure(f"{half}.{field.name}", collective, getattr(part, field.name))
        for half, part in (("attn", made.attn), ("ffn", made.ffn))
        for field in fields(part)
        for collective in COLLECTIVES
        if collective == "all_reduce" or getattr(part, field.name).size() > 1
    ]
    if dist.get_rank() == 0:
        report.write_text(json.dumps(results))
    dist.barrier()
    groups.destroy()
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One collective with its data: ``call`` may be repeated, ``is_right`` holds after the first call."""

    call: Callable[[], object]
    is_right: Callable[[], bool]


def measure(name: str, collective: str, group: dist.ProcessGroup) -> dict[str, object]:
    """Check and time one collective on all groups of one axis at a time. Collective over WORLD."""
    prepare, share = COLLECTIVES[collective]
    size = group.size()
    num_floats = NUM_FLOATS[current_device().kind] // size * size
    trial = prepare(group, num_floats)
    trial.call()
    right = trial.is_right()
    started = time.perf_counter()
    for _ in range(REPEATS):
        trial.call()
    _wait()
    seconds = (time.perf_counter() - started) / REPEATS
    worst = torch.tensor([seconds, 0.0 if right else 1.0], device=current_device().torch_device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    moved = share * num_floats * 4 * (size - 1) / size
    return {
        "group": name,
        "ranks": dist.get_process_group_ranks(group),
        "collective": collective,
        "right": not worst[1].item(),
        "num_bytes": num_floats * 4,
        "bytes_per_s": moved / worst[0].item(),
    }


def _wait() -> None:
    if current_device().kind == "cuda":
        torch.cuda.synchronize()


def all_reduce(group: dist.ProcessGroup, num_floats: int) -> Trial:
    """Sum of rank + 1 over the group."""
    data = torch.full((num_floats,), float(dist.get_rank() + 1), device=current_device().torch_device)
    total = sum(rank + 1 for rank in dist.get_process_group_ranks(group))
    return Trial(call=lambda: dist.all_reduce(data, group=group), is_right=lambda: _all_are(data, total))


def all_gather(group: dist.ProcessGroup, num_floats: int) -> Trial:
    """Every rank's own number, in the group's order."""
    ranks = dist.get_process_group_ranks(group)
    place = current_device().torch_device
    mine = torch.full((num_floats // len(ranks),), float(dist.get_rank()), device=place)
    data = torch.empty(num_floats, device=place)
    return Trial(
        call=lambda: dist.all_gather_into_tensor(data, mine, group=group),
        is_right=lambda: _parts_are(data, ranks),
    )


def all_to_all(group: dist.ProcessGroup, num_floats: int) -> Trial:
    """To each rank a number that tells sender and receiver: what experts' tokens do."""
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    world, length = dist.get_world_size(), num_floats // len(ranks)
    place = current_device().torch_device
    given = torch.cat([torch.full((length,), float(me * world + to), device=place) for to in ranks])
    data = torch.empty_like(given)
    return Trial(
        call=lambda: dist.all_to_all_single(data, given, group=group),
        is_right=lambda: _parts_are(data, [sender * world + me for sender in ranks]),
    )


def _parts_are(data: torch.Tensor, wanted: list[int]) -> bool:
    return all(_all_are(part, number) for part, number in zip(data.chunk(len(wanted)), wanted, strict=True))


def _all_are(data: torch.Tensor, wanted: float) -> bool:
    return bool((data == wanted).all().item())


COLLECTIVES: dict[str, tuple[Callable[[dist.ProcessGroup, int], Trial], float]] = {
    "all_reduce": (all_reduce, 2.0),
    "all_gather": (all_gather, 1.0),
    "all_to_all": (all_to_all, 1.0),
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
