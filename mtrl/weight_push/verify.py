"""Does the engine hold what the trainer has? Checksums of every box that a push delivers, from both sides."""

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.models.boxes import Box
from mtrl.models.transfers import Transfer
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import WeightError
from mtrl.weight_push.nodes import NodePlan
from mtrl.weight_push.views import Views

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PERIOD = 65521  # positions are weighted modulo a prime, which no tensor's dims are multiples of


class Checksums:
    """Compares the trainer's elements with the engine's, box by box, in ``dtype``.

    Reads both live tensors anew, past all buckets of the push. What is forwarded is compared with the rank
    that trains it, not with the one that forwarded it.
    """

    def __init__(self, plan: NodePlan, views: Views, dtype: torch.dtype) -> None:
        self._views, self._dtype = views, dtype
        self._transfers = _from_trainers(plan)

    def check(self, replayed_wrong: Sequence[str] = ()) -> None:
        """Compare all boxes. Collective over WORLD.

        ``replayed_wrong`` are tensors that this rank's engine holds otherwise than they were staged.

        Raises:
            WeightError: on all ranks; it names the first tensor that differs.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        device = current_device().torch_device
        sending = [
            [t for t in self._transfers if t.source == rank and t.target == r] for r in range(world_size)
        ]
        arriving = [
            [t for t in self._transfers if t.target == rank and t.source == r] for r in range(world_size)
        ]
        said = [self._held(each) for each in itertools.chain.from_iterable(sending)]
        sent = torch.tensor(said, dtype=torch.int64, device=device).view(-1, 2)
        received = torch.empty(sum(map(len, arriving)), 2, dtype=torch.int64, device=device)
        dist.all_to_all_single(received, sent, list(map(len, arriving)), list(map(len, sending)))
        differ = list(replayed_wrong) + [
            f"{each.name}{list(each.box.ranges)} from rank {each.source} to rank {rank}"
            for each, expected in zip(itertools.chain.from_iterable(arriving), received.tolist(), strict=True)
            if self._wanted(each) != tuple(expected)
        ]
        found = list(itertools.chain.from_iterable(gather_json(differ[:3])))
        if found:
            raise WeightError(
                f"after the push the engine does not hold the trainer's weights: {found[0]}"
                + (f", and {len(found) - 1} more" if len(found) > 1 else "")
            )

    def _held(self, transfer: Transfer) -> tuple[int, int]:
        return checksum(self._assembled(transfer.box, self._views.held(transfer.name, transfer.box)))

    def _wanted(self, transfer: Transfer) -> tuple[int, int] | None:
        """None if two places of the engine for one element differ."""
        whole = self._assembled(transfer.box, self._views.delivered(transfer.name, transfer.box))
        for part, view in self._views.wanted(transfer.name, transfer.box):
            there = whole[part.relative_to(transfer.box).slices]
            if not there.equal(view.reshape(part.shape).to(self._dtype)):
                return None
        return checksum(whole)

    def _assembled(self, box: Box, parts: Iterable[tuple[Box, Tensor]]) -> Tensor:
        whole = torch.empty(box.shape, dtype=self._dtype, device=current_device().torch_device)
        for part, view in parts:
            whole[part.relative_to(box).slices] = view.detach().reshape(part.shape).to(self._dtype)
        return whole


def _from_trainers(plan: NodePlan) -> list[Transfer]:
    """Every delivery with the rank that trains its elements for source."""
    first = list(plan.first.transfers)
    by_target: dict[tuple[str, int], list[Transfer]] = {}
    for each in first:
        by_target.setdefault((each.name, each.target), []).append(each)
    for each in plan.forwarded.transfers:
        for brought in by_target.get((each.name, each.source), []):
            common = brought.box.intersect(each.box)
            if common is not None:
                first.append(Transfer(name=each.name, box=common, source=brought.source, target=each.target))
    return first


def checksum(tensor: Tensor) -> tuple[int, int]:
    """The sum of a contiguous tensor's bits as integers, and one weighted by position; both modulo 2**64."""
    bits = tensor.view(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    position = torch.arange(bits.numel(), dtype=torch.int64, device=bits.device) % _PERIOD + 1
    return int(bits.sum()), int((bits * position).sum())
