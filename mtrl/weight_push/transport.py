"""How a bucket gets from rank to rank: torch.distributed's collectives, or memory that processes share.

Both give each round its buffers once and count what arrives. Shared memory saves a copy and all of gloo's
sockets, where every rank is on one machine and has its weights on the CPU: a receiver copies from the
sender's own bucket into the engine. NCCL does the like between GPUs of a machine itself.
"""

import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.agreement import gather_json
from mtrl.parallel.errors import RolloutError

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

_HAS_SHARED_FILES = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


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


class SharedMemoryTransport:
    """Each rank fills its own bucket, which the others have mapped; they read it after a barrier.

    A bucket has two halves that rounds take in turn: a rank that is a barrier ahead writes to the other.
    The memory has no name in any file system, so that no crash leaves it behind.
    """

    name = "shared_memory"

    def __init__(self) -> None:
        self.num_bytes = 0

    def open(self, rounds: Sequence[RoundSizes], device: torch.device) -> list[Wire]:
        """See `Transport.open`; RolloutError on all ranks where one has no memory for it."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        halves = [
            _aligned(max((each.num_sent(source) for each in rounds), default=0))
            for source in range(world_size)
        ]
        buckets = _share([half * min(len(rounds), 2) for half in halves])
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
        dist.barrier()
        return sum(each.nbytes for each in wire.received)


def choose(name: TransportName, device: torch.device) -> Transport:
    """The transport of that name; ``auto`` shares memory where it can. Collective over WORLD.

    Raises:
        RolloutError: ``shared_memory`` was asked for and these ranks have none in common.
    """
    if name == "collective" or (name == "auto" and device.type != "cpu"):
        return CollectiveTransport()
    if device.type == "cpu" and _have_memory_in_common():
        return SharedMemoryTransport()
    if name == "auto":
        return CollectiveTransport()
    raise RolloutError(
        "rollout.push_transport=shared_memory needs engines on the CPU, and all ranks on one Linux machine "
        "in one container; use rollout.push_transport=auto"
    )


def _have_memory_in_common() -> bool:
    """Whether each rank can read what the others put into theirs; the same answer on all."""
    token = secrets.token_bytes(16)
    own = _file_of(token)
    place = _place_of_processes()
    everyones = gather_json([place, os.getpid(), own, token.hex()])
    try:
        # Elsewhere a process id means another process, whose files are nobody's business and may block.
        reads = all(each[0] == place for each in everyones) and all(
            _can_read(*each[1:]) for each in everyones
        )
        return all(gather_json(reads))
    finally:
        if own >= 0:
            os.close(own)


def _file_of(token: bytes) -> int:
    """A file in memory that holds ``token``; -1 where there can be none, or no memory is left."""
    if not _HAS_SHARED_FILES:
        return -1
    own = -1
    try:
        own = os.memfd_create("mtrl-probe", os.MFD_CLOEXEC)
        os.write(own, token)
    except OSError:  # told to the others, which would wait for this rank if it raised
        if own >= 0:
            os.close(own)
        return -1
    return own


def _place_of_processes() -> list[str]:
    """Where process ids mean the same: the running kernel, and the namespace in it."""
    if not _HAS_SHARED_FILES:
        return [secrets.token_hex(8)]
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]


def _can_read(pid: int, number: int, token: str) -> bool:
    try:
        with open(f"/proc/{pid}/fd/{number}", "rb") as file:
            return file.read().hex() == token
    except OSError:  # of another user, or with another view of /proc
        return False


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _share(sizes: Sequence[int]) -> list[Tensor]:
    """Every rank's flat tensor of so many bytes, in memory that all ranks have mapped. Collective."""
    rank = dist.get_rank()
    own = -1
    error: OSError | MemoryError | None = None
    try:
        # Pages come when they are written, without an error where there are none: so ask before.
        if sizes[rank] > (available := _available_bytes()):
            raise MemoryError(f"{available} bytes are available")
        own = os.memfd_create("mtrl-push", os.MFD_CLOEXEC)
        os.ftruncate(own, sizes[rank])
    except (OSError, MemoryError) as caught:
        error = caught
    everyones = gather_json([os.getpid(), own, None if error is None else str(error)])
    failed = [number for number, each in enumerate(everyones) if each[2] is not None]
    if failed:
        if own >= 0:
            os.close(own)
        raise RolloutError(
            f"rank {failed[0]} could not allocate {sizes[failed[0]]} bytes of shared memory for the push: "
            f"{everyones[failed[0]][2]}; free memory, or use rollout.push_transport=collective"
        ) from error
    tensors = [_map(pid, number, size) for (pid, number, _), size in zip(everyones, sizes, strict=True)]
    dist.barrier()  # everyone has it mapped: it lives as long as the mappings
    os.close(own)
    return tensors


def _available_bytes() -> int:
    """Memory that this machine can still give, by the kernel's estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _map(pid: int, number: int, size: int) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with open(f"/proc/{pid}/fd/{number}", "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
