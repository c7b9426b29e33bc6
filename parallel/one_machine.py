"""Processes of one machine: memory that they have in common, and pipes between them. Linux alone.

Files in memory have no name in any file system, so that no crash leaves one behind; others of the same user
open them, and pipes, through ``/proc``. A word through pipes takes a twentieth of a gloo collective's time.
"""

import mmap
import os
import secrets
import select
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.agreement import Said, gather_json
from mtrl.parallel.errors import LostRanksError

_HAS_SHARED_FILES = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")
_HAS_PROCESS_FILES = hasattr(os, "pidfd_open")
_WORDS_AT_ONCE = 64


def have_memory_in_common() -> bool:
    """Whether each rank can read what the others put into a file in memory; the same answer on all.

    Collective over WORLD.
    """
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


def memory_file(size: int) -> int:
    """The descriptor of a new file in memory of ``size`` bytes; OSError, or MemoryError if there is less."""
    # Pages come when they are written, without an error where there are none: so ask before.
    if size > (available := _available_bytes()):
        raise MemoryError(f"{available} bytes are available")
    own = os.memfd_create("mtrl-weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(own, size)
    except OSError:
        os.close(own)
        raise
    return own


def map_file(pid: int | Literal["self"], number: int, parts: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Parts of a process's file in memory, each of (start, size) in bytes and with a storage of its own.

    They live as long as somebody has them mapped, and take one descriptor together.
    """
    if not any(size for _, size in parts):
        return [torch.empty(0, dtype=torch.uint8) for _ in parts]
    with open(f"/proc/{pid}/fd/{number}", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    return [
        torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start)
        if size
        else torch.empty(0, dtype=torch.uint8)
        for start, size in parts
    ]


class Pipes:
    """Between all ranks of WORLD, which are on one machine: each has an inbox that the others write to.

    Built collectively over WORLD. ``timeout_s`` bounds how long a rank waits for the others.
    """

    # rank, whether it failed, which exchange this is, the number: written at once, so never interleaved.
    _WORD = struct.Struct("<iiqq")

    def __init__(self, timeout_s: float) -> None:
        self._rank, self._timeout_s, self._count = dist.get_rank(), timeout_s, 0
        self._early: dict[int, dict[int, Said]] = {}
        self._inbox, outlet = os.pipe()
        places = gather_json([os.getpid(), outlet])
        others = {rank: place for rank, place in enumerate(places) if rank != self._rank}
        self._outlets = {
            rank: os.open(f"/proc/{pid}/fd/{number}", os.O_WRONLY | os.O_CLOEXEC)
            for rank, (pid, number) in others.items()
        }
        # Such a file can be read once its process has ended.
        self._lives = {os.pidfd_open(pid): rank for rank, (pid, _) in others.items()}
        self._ended: set[int] = set()
        dist.barrier()  # everyone has opened them
        os.close(outlet)
        self._poll = select.poll()
        for descriptor in (self._inbox, *self._lives):
            self._poll.register(descriptor, select.POLLIN)
        weakref.finalize(self, _close, [self._inbox, *self._outlets.values(), *self._lives])

    @staticmethod
    def are_possible() -> bool:
        """Whether all ranks' kernels have what it takes, given memory in common. Collective over WORLD."""
        return all(gather_json(_HAS_PROCESS_FILES))

    def tell(self, failed: bool, number: int) -> list[Said]:
        """What every rank says, in rank order; what ranks wrote before, others see after. Collective.

        Raises:
            LostRanksError: a rank has ended, or says nothing.
        """
        return self._said(failed, [number] * (1 + len(self._outlets)))

    def swap(self, numbers: Sequence[int]) -> list[int]:
        """Say another number to each rank; what each says to this one. Else as `tell`."""
        return [number for _, number in self._said(False, numbers)]

    def _said(self, failed: bool, numbers: Sequence[int]) -> list[Said]:
        self._count += 1
        said = {self._rank: (failed, numbers[self._rank])}
        for rank, outlet in self._outlets.items():
            word = self._WORD.pack(self._rank, failed, self._count, numbers[rank])
            try:
                os.write(outlet, word)
            except BrokenPipeError:
                continue  # it has ended; what it said before is still read
        said |= self._early.pop(self._count, {})
        while len(said) <= len(self._outlets):
            self._read(said)
        return [said[rank] for rank in sorted(said)]

    def _read(self, said: dict[int, Said]) -> None:
        ready = self._poll.poll(1e3 * self._timeout_s)
        words = b""
        for each, _ in ready:
            if each == self._inbox:
                words = os.read(each, _WORDS_AT_ONCE * self._WORD.size)
        if words:
            for rank, failed, count, number in self._WORD.iter_unpack(words):
                into = said if count == self._count else self._early.setdefault(count, {})
                into[rank] = (bool(failed), number)
            return  # an ended rank's last words come before it is taken for lost
        for each, _ in ready:
            self._ended |= {self._lives[each]} if each in self._lives else set(self._lives.values())
            self._poll.unregister(each)  # the inbox too, where nobody is left who could write to it
        missing = set(self._lives.values()) - set(said)
        if lost := sorted(missing & self._ended):
            raise LostRanksError(f"rank {lost[0]} has ended")
        if not ready:
            raise LostRanksError(f"rank {min(missing)} said nothing for {self._timeout_s:g} s")


def _close(descriptors: Sequence[int]) -> None:
    for each in descriptors:
        os.close(each)


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


def _available_bytes() -> int:
    """Memory that this machine can still give, by the kernel's estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
