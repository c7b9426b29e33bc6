"""Trainer and engine take turns with a GPU's memory: who is about to work says so, and the other makes room.

    memory.to("training")   before steps and checkpoints: the engine sleeps, what was offloaded is onloaded
    memory.to("push")       the optimizer and gradients are offloaded, the engine's weights wake
    memory.to("sampling")   the trainer's weights are offloaded, the KV cache wakes

Offloading copies a tensor's storage to host memory and empties it; onloading fills it again. The tensor and
all its views stay the objects they were, so Megatron's buffers, the optimizer and the plan of a push need not
know. Nothing here is collective.
"""

import resource
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mtrl.config_engines import Offload
from mtrl.parallel.device import current_device

Stage = Literal["training", "push", "check", "sampling"]
Part = Literal["optimizer", "gradients", "weights"]
EnginePart = Literal["weights", "kv_cache"]

_AWAY: dict[Offload, dict[Stage, tuple[Part, ...]]] = {
    "none": {},
    "optimizer": dict.fromkeys(("push", "check", "sampling"), ("gradients", "optimizer")),
    "all": {
        "push": ("gradients", "optimizer"),
        "check": ("gradients", "optimizer"),
        "sampling": ("gradients", "optimizer", "weights"),
    },
}
_AWAKE: dict[Stage, tuple[EnginePart, ...]] = {
    "training": (),
    "push": ("weights",),
    "check": ("weights", "kv_cache"),
    "sampling": ("weights", "kv_cache"),
}


class Sleeper(Protocol):
    """An engine that can give its memory back."""

    def sleep(self) -> None:
        """Give weights and KV cache back; their contents are lost."""
        ...

    def wake(self, part: EnginePart) -> None:
        """Take memory for ``part`` again, at the same addresses."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One thing done in a hand-over: bytes it moved (0 for the engine's), and bytes in use on this device
    before and after it.
    """

    stage: Stage
    what: str
    moved: int
    before: int
    after: int


class HostCopy:
    """Tensors of one kind, offloaded together. ``keeps``: whether their contents matter."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, keeps: bool = True) -> None:
        self._tensors, self._keeps = tensors, keeps
        self._offloaded: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        self._host: dict[tuple[int, int], Tensor] = {}  # kept: page-locked memory is slow to make

    def offload(self) -> int:
        """Empty the storages; the bytes they had."""
        assert not self._offloaded, "offloaded already"
        found = {each.untyped_storage()._cdata: each.untyped_storage() for each in self._tensors()}
        sizes = {key: storage.nbytes() for key, storage in found.items()}
        self._host = {place: copy for place, copy in self._host.items() if sizes.get(place[0]) == place[1]}
        for key, storage in found.items():
            if not storage.resizable():
                continue  # on a CPU, once numpy was given a view, as when a checkpoint was written
            copy = self._copy(key, storage, sizes[key]) if self._keeps else None
            self._offloaded.append((storage, sizes[key], copy))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        for storage, _, _ in self._offloaded:
            storage.resize_(0)
        return self._num_bytes

    def onload(self) -> int:
        """Fill the storages again, with anything where contents do not matter; the bytes they have."""
        num_bytes = self._num_bytes
        for storage, size, copy in self._offloaded:
            storage.resize_(size)
            if copy is not None:
                _bytes_of(storage, size).copy_(copy, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._offloaded.clear()
        return num_bytes

    @property
    def _num_bytes(self) -> int:
        return sum(size for _, size, _ in self._offloaded)

    def _copy(self, key: int, storage: torch.UntypedStorage, size: int) -> Tensor:
        is_locked = storage.device.type == "cuda"
        if (key, size) not in self._host:
            self._host[key, size] = torch.empty(size, dtype=torch.uint8, pin_memory=is_locked)
        return self._host[key, size].copy_(_bytes_of(storage, size), non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage, size: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))


class Memory:
    """Whose turn it is, and what each hand-over did (``moves``, of the last one into each stage).

    ``parts`` are the trainer's; ``engine`` is None where nothing sleeps. ``is_engine_empty``: it has
    slept since `Memory` was last told that its weights are there (``filled``).
    """

    def __init__(self, parts: Mapping[Part, HostCopy], engine: Sleeper | None, offload: Offload) -> None:
        self.parts, self.engine = parts, engine
        self.stage: Stage = "training"
        self.is_engine_empty = False
        self.moves: dict[Stage, list[Move]] = {}
        self._targets = _AWAY[offload]
        self._away: tuple[Part, ...] = ()
        self._awake: tuple[EnginePart, ...] = ("weights", "kv_cache")  # an engine is made awake

    def to(self, stage: Stage) -> None:
        """Make room for ``stage``; does nothing where it is its turn."""
        if stage == self.stage and stage in self.moves:
            return
        self.stage, moves = stage, []
        away, awake = self._targets.get(stage, ()), _AWAKE[stage]

        def do(what: str, action: Callable[[], int | None]) -> None:
            before = bytes_in_use()
            moved = action() or 0
            moves.append(Move(stage=stage, what=what, moved=moved, before=before, after=bytes_in_use()))

        # First what frees memory, then what takes it.
        if self.engine is not None and not set(self._awake) <= set(awake):
            do("engine sleeps", self.engine.sleep)
            self._awake, self.is_engine_empty = (), True
        for part in away:
            if part not in self._away:
                do(f"{part} offloaded", self.parts[part].offload)
        if moves and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the engine allocates past torch's cache
        for part in reversed(self._away):
            if part not in away:
                do(f"{part} onloaded", self.parts[part].onload)
        if self.engine is not None:
            for piece in awake:
                if piece not in self._awake:
                    do(f"engine's {piece} wakes", partial(self.engine.wake, piece))
            self._awake = awake
        self._away = away
        self.moves[stage] = moves

    def close(self) -> None:
        """Before an engine is shut down, which frees memory that it has."""
        if self.engine is not None:
            for piece in _AWAKE["sampling"]:
                if piece not in self._awake:
                    self.engine.wake(piece)

    def filled(self) -> None:
        """A push has filled the engine's weights."""
        self.is_engine_empty = False

    def report(self) -> list[Any]:
        """The last hand-over into each stage, as JSON."""
        return [asdict(move) for stage in _AWAKE for move in self.moves.get(stage, [])]


def bytes_in_use() -> int:
    """Of this process's GPU, by anyone; on a CPU, what this process has resident."""
    device = current_device()
    if device.kind == "cuda":
        free, total = torch.cuda.mem_get_info(device.torch_device)
        return total - free
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0  # not Linux
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
