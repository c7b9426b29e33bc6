"""How a bucket gets from rank to rank: torch.distributed's collectives, or memory that processes share.

Both give each round its buffers once and count what arrives. Shared memory saves a copy and all of gloo's
sockets, where every rank is on one machine and has its weights on the CPU: a receiver copies from the
sender's own bucket into the engine. NCCL does the like between GPUs of a machine itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.agreement import Said, tell_all
from mtrl.parallel.errors import RolloutError
from mtrl.parallel.groups import DEFAULT_TIMEOUT_S
from mtrl.parallel.one_machine import Pipes, have_memory_in_common, share

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

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One round's buffers on this rank, flat: all that it sends, by target; what comes from each source."""

    sent: Tensor
    received: tuple[Tensor, ...]
    sizes: Sizes


class Transport(Protocol):
    """Buffers for rounds, and their exchange."""

    @property
    def name(self) -> str:
        """As in the config."""

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers on this rank."""

    def open(self, rounds: Sequence[RoundSizes], device: torch.device) -> list[Wire]:
        """Buffers for rounds that take turns. Collective over WORLD."""

    def exchange(self, wire: Wire) -> int:
        """Bring what all ranks have put into ``sent`` to ``received``; bytes that this rank received.

        Collective over WORLD; until the next `exchange`, or the end of the push, ``received`` stays.
        """

    def tell(self, failed: bool, number: int) -> list[Said]:
        """What every rank says, in rank order. Collective over WORLD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _CollectiveWire(Wire):
    """With both buckets as bytes (not every library knows every dtype), and bytes by target and source."""

    outbox: Tensor
    inbox: Tensor
    bytes_sent: list[int]
    bytes_received: list[int]


class CollectiveTransport:
    """One ``all_to_all_single`` a round, between two buckets that all rounds share."""

    name = "collective"

    def __init__(self) -> None:
        self.num_bytes = 0

    def open(self, rounds: Sequence[RoundSizes], device: torch.device) -> list[Wire]:
        """See `Transport.open`."""
        rank = dist.get_rank()
        outbox = _bytes(max((each.num_sent(rank) for each in rounds), default=0), device)
        inbox = _bytes(max((each.num_received(rank) for each in rounds), default=0), device)
        self.num_bytes += outbox.nbytes + inbox.nbytes
        wires: list[Wire] = []
        for each in rounds:
            sent, received = outbox[: each.num_sent(rank)], inbox[: each.num_received(rank)]
            wires.append(
                _CollectiveWire(
                    sent=sent.view(each.dtype),
                    received=received.view(each.dtype).split(each.received(rank)),
                    sizes=each.elements,
                    outbox=sent,
                    inbox=received,
                    bytes_sent=[count * each.dtype.itemsize for count in each.elements[rank]],
                    bytes_received=[count * each.dtype.itemsize for count in each.received(rank)],
                )
            )
        return wires

    def exchange(self, wire: Wire) -> int:
        """See `Transport.exchange`."""
        assert isinstance(wire, _CollectiveWire)
        dist.all_to_all_single(wire.inbox, wire.outbox, wire.bytes_received, wire.bytes_sent)
        return wire.inbox.nbytes

    def tell(self, failed: bool, number: int) -> list[Said]:
        """See `Transport.tell`."""
        return tell_all(failed, number)


class SharedMemoryTransport:
    """Each rank fills its own bucket, which the others have mapped; they read it when all have said so.

    A bucket has two halves that rounds take in turn: a rank that is a round ahead writes to the other.
    Built collectively over WORLD.
    """

    name = "shared_memory"

    def __init__(self) -> None:
        self.num_bytes = 0
        self._pipes = Pipes(DEFAULT_TIMEOUT_S) if Pipes.are_possible() else None

    def open(self, rounds: Sequence[RoundSizes], device: torch.device) -> list[Wire]:
        """See `Transport.open`; RolloutError on all ranks where one has no memory for it."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        halves = [
            _aligned(max((each.num_sent(source) for each in rounds), default=0))
            for source in range(world_size)
        ]
        buckets = share([half * min(len(rounds), 2) for half in halves])
        self.num_bytes += buckets[rank].nbytes
        wires = []
        for number, each in enumerate(rounds):
            starts = [number % 2 * half for half in halves]
            sent = [
                bucket[start : start + each.num_sent(source)].view(each.dtype)
                for source, (bucket, start) in enumerate(zip(buckets, starts, strict=True))
            ]
            received = tuple(
                sent[source].split(list(each.elements[source]))[rank] for source in range(world_size)
            )
            wires.append(Wire(sent=sent[rank], received=received, sizes=each.elements))
        return wires

    def exchange(self, wire: Wire) -> int:
        """See `Transport.exchange`."""
        self.tell(False, 0)
        return sum(each.nbytes for each in wire.received)

    def tell(self, failed: bool, number: int) -> list[Said]:
        """See `Transport.tell`."""
        return self._pipes.tell(failed, number) if self._pipes else tell_all(failed, number)


def choose(name: TransportName, device: torch.device) -> Transport:
    """The transport of that name; ``auto`` shares memory where it can. Collective over WORLD.

    Raises:
        RolloutError: ``shared_memory`` was asked for and these ranks have none in common.
    """
    if name == "collective" or (name == "auto" and device.type != "cpu"):
        return CollectiveTransport()
    if device.type == "cpu" and have_memory_in_common():
        return SharedMemoryTransport()
    if name == "auto":
        return CollectiveTransport()
    raise RolloutError(
        "rollout.push_transport=shared_memory needs engines on the CPU, and all ranks on one Linux machine "
        "in one container; use rollout.push_transport=auto"
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
