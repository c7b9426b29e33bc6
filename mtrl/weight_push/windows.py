"""Engines that other ranks of a machine write to: each element travels once, to where it is used.

What MPI calls windows and one-sided puts. Every rank has the others' live weights mapped, and knows from the
record of their loaders where which element goes; so a push has no buckets, and no rank copies for another.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mtrl.models.boxes import Box
from mtrl.parallel.agreement import agree, gather_json
from mtrl.parallel.errors import RolloutError
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.kernel_layout import KernelLayout, PackBlocks
from mtrl.rollout.loader_record import LoaderRecord
from mtrl.rollout.places import Places
from mtrl.rollout.shared_weights import map_weights, share_weights
from mtrl.weight_push.copies import Copies, Pair
from mtrl.weight_push.nodes import NodePlan
from mtrl.weight_push.plan import Needs
from mtrl.weight_push.rounds import Round, Rounds, local_copies
from mtrl.weight_push.transport import SharedMemoryTransport
from mtrl.weight_push.turns import packed
from mtrl.weight_push.views import EngineViews, Views, matched


def open_windows(
    engine: InPlaceEngine, record: LoaderRecord, staging: Mapping[str, Tensor], names: Collection[str]
) -> dict[int, EngineViews]:
    """The other ranks' engines as far as this one writes to them; ``names`` are what travels to this one.

    Collective over WORLD, whose ranks have memory in common. From then on the engine's weights lie in it.

    Raises:
        RolloutError: on all ranks, when one cannot have its weights there, or cannot map another's.
    """
    said: dict[str, Any] = {}
    files: list[int] = []
    error: Exception | None = None
    try:
        weights, descriptors = engine.shared()
        staged, files = share_weights(staging) if staging else ({}, [])
        said = {
            "pid": os.getpid(),
            "weights": [weights, descriptors],
            "staging": [staged, files],
            "layouts": {name: asdict(each) for name, each in engine.layouts.items()},
            "record": record.only(names).to_json(),
        }
    except Exception as caught:  # told to all ranks at once
        error = caught
    windows: dict[int, EngineViews] = {}
    try:
        everyones = gather_json(said)
        agree(error, kind=RolloutError)
        try:
            windows = {rank: _window(each) for rank, each in enumerate(everyones) if rank != dist.get_rank()}
        except Exception as caught:  # told to all ranks at once
            error = caught
        agree(error, kind=RolloutError)  # and everyone has mapped everything
    finally:
        for number in files:
            os.close(number)
    return windows


def _window(said: Mapping[str, Any]) -> EngineViews:
    layouts = {name: KernelLayout(**each) for name, each in said["layouts"].items()}
    (weights, files), (staged, staged_files) = said["weights"], said["staging"]
    return EngineViews(
        needs=Needs.of(LoaderRecord.from_json(said["record"])),
        placed=Places(map_weights(weights, files, said["pid"]), layouts).placed,
        staging=map_weights(staged, staged_files, said["pid"]) if staged else {},
    )


def doubled(views: EngineViews, name: str, box: Box) -> Iterator[Pair]:
    """What brings delivered elements to the engine's other places for them; few engines have any."""
    for target, source in matched(views.delivered, views.wanted, name, box):
        if target.data_ptr() != source.data_ptr():
            yield target, source


def make_writes(
    plan: NodePlan,
    views: Views,
    windows: Mapping[int, EngineViews],
    *,
    transport: SharedMemoryTransport,
    rank: int,
    world_size: int,
    pack: PackBlocks | None,
) -> Rounds:
    """The plan as writes. The first round's exchange says that every rank is in the update, each later one's
    that what was written before is there; what an engine keeps twice, it then copies itself.
    """
    rounds = [Round(exchange=partial(transport.exchange, [0] * world_size))]
    for stage, read in ((plan.first, views.held), (plan.forwarded, views.delivered)):
        travelling = [each for each in stage.transfers if each.source != each.target]
        if not travelling:
            continue
        doubles, written = Copies(), [0] * world_size
        for each in travelling:
            if each.source == rank:
                pairs = list(matched(read, windows[each.target].delivered, each.name, each.box))
                rounds[-1].after.extend(pairs)
                written[each.target] += sum(target.nbytes for target, _ in pairs)
            elif each.target == rank:
                doubles.extend(doubled(views, each.name, each.box))
        rounds.append(Round(exchange=partial(transport.exchange, written), after=doubles))
    for step in rounds:
        step.after = packed(step.after.coalesced(), pack)
    local = local_copies(plan, views, rank, pack)
    return Rounds(local=local, rounds=rounds if len(rounds) > 1 else [])
