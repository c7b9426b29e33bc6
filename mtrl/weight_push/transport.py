"""How weights get from rank to rank: through buckets, or written at once to where they are used.

Both count what arrives. `CollectiveTransport` has torch.distributed exchange buckets. Where all ranks are on
one machine and have their weights on the CPU, `SharedMemoryTransport` has no buckets: ranks write to each
other's engines (``windows.py``), as one-sided puts do in MPI, and say when they are in an update and when
they have written. NCCL does the like between GPUs of a machine itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.agreement import Said, tell_all
from mtrl.parallel.errors import RolloutError
from mtrl.parallel.groups import DEFAULT_TIMEOUT_S
from mtrl.parallel.one_machine import Pipes, have_memory_in_common

Sizes = Sequence[Sequence[int]]
"""Elements that travel in a round: ``[source][target]``, with zeros for a rank to itself."""


@dataclass(frozen=True, slots=True)
class RoundSizes:
    """What travels in a round, all of one dtype."""

    elements: Sizes
    dtype: torch.dtype

    def num_sent(self, rank: int) -> int:
        """Bytes that a rank sends."""
        return sum(self.elements[rank]) * self.dtype.itemsize

    def received(self, rank: int) -> list[int]:
        """Elements that come to a rank, by source."""
        return [row[rank] for row in self.elements]

    def num_received(self, rank: int) -> int:
        """Bytes that come to a rank."""
        return sum(self.received(rank)) * self.dtype.itemsize


TransportName = Literal["auto", "collective", "shared_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One round's buffers on this rank, flat: all that it sends, by target; what comes from each source.

    ``outbox`` and ``inbox`` are both as bytes (not every library knows every dtype), with bytes by target and
    source.
    """

    sent: Tensor
    received: tuple[Tensor, ...]
    outbox: Tensor
    inbox: Tensor
    bytes_sent: list[int]
    bytes_received: list[int]


class CollectiveTransport:
    """One ``all_to_all_single`` a round, between two buckets that all rounds share."""

    name = "collective"

    def __init__(self) -> None:
        self.num_bytes = 0
        """Memory of the buckets on this rank."""

    def open(self, rounds: Sequence[RoundSizes], device: torch.device) -> list[Wire]:
        """Buffers for rounds that take turns."""
        rank = dist.get_rank()
        outbox = _bytes(max((each.num_sent(rank) for each in rounds), default=0), device)
        inbox = _bytes(max((each.num_received(rank) for each in rounds), default=0), device)
        self.num_bytes += outbox.nbytes + inbox.nbytes
        wires: list[Wire] = []
        for each in rounds:
            sent, received = outbox[: each.num_sent(rank)], inbox[: each.num_received(rank)]
            wires.append(
                Wire(
                    sent=sent.view(each.dtype),
                    received=received.view(each.dtype).split(each.received(rank)),
                    outbox=sent,
                    inbox=received,
                    bytes_sent=[count * each.dtype.itemsize for count in each.elements[rank]],
                    bytes_received=[count * each.dtype.itemsize for count in each.received(rank)],
                )
            )
        return wires

    def exchange(self, wire: Wire) -> list[int]:
        """Bring what all ranks have put into ``sent`` to ``received``; bytes that came from each rank.

        Collective over WORLD; until the next `exchange`, ``received`` stays.
        """
        dist.all_to_all_single(wire.inbox, wire.outbox, wire.bytes_received, wire.bytes_sent)
        return wire.bytes_received

    def tell(self, failed: bool, number: int) -> list[Said]:
        """What every rank says, in rank order. Collective over WORLD."""
        return tell_all(failed, number)


class SharedMemoryTransport:
    """Ranks write to each other's engines themselves; what is left to exchange is a word through pipes.

    Built collectively over WORLD, whose ranks have memory in common.
    """

    name = "shared_memory"

    def __init__(self) -> None:
        self._pipes = Pipes(DEFAULT_TIMEOUT_S)

    def exchange(self, written: Sequence[int]) -> list[int]:
        """Say how many bytes this rank has written to each, all of it before; how many each has written here.

        Collective over WORLD.
        """
        return self._pipes.swap(written)

    def tell(self, failed: bool, number: int) -> list[Said]:
        """What every rank says, in rank order. Collective over WORLD."""
        return self._pipes.tell(failed, number)


Transport: TypeAlias = CollectiveTransport | SharedMemoryTransport


def choose(name: TransportName, device: torch.device) -> Transport:
    """The transport of that name; ``auto`` shares memory where it can. Collective over WORLD.

    Raises:
        RolloutError: ``shared_memory`` was asked for and these ranks have none in common.
    """
    if name == "collective" or (name == "auto" and device.type != "cpu"):
        return CollectiveTransport()
    if device.type == "cpu" and have_memory_in_common() and Pipes.are_possible():
        return SharedMemoryTransport()
    if name == "auto":
        return CollectiveTransport()
    raise RolloutError(
        "rollout.push_transport=shared_memory needs engines on the CPU, and all ranks on one Linux machine "
        "in one container; use rollout.push_transport=auto"
    )


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
