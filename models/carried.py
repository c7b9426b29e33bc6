"""Tensors that a checkpoint holds and the model does not compute: kept from load to export, bit by bit.

These are multi-token prediction layers. They are not trained: after training they still predict what the
model would have said before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mtrl.models.boxes import Box
from mtrl.models.sources import TensorSource


@dataclass(slots=True, kw_only=True)
class Carried:
    """This rank's share of them, and who holds which.

    ``shapes`` are those of all ranks, ``held[r]`` the names that rank r holds whole, ``tensors`` this rank's
    on the CPU, in the checkpoint's dtype (bf16 for one that was quantised).
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    held: tuple[tuple[str, ...], ...] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, source: TensorSource, names: Sequence[str], *, rank: int, world_size: int) -> None:
        """Replace what is held by this rank's share of ``names``. Not collective; every rank shares alike."""
        shapes = source.shapes()
        self.shapes = {name: shapes[name] for name in names}
        self.held = share_out(self.shapes, world_size)
        self.tensors = {name: source.read(name, Box.full(shapes[name])) for name in self.held[rank]}


def share_out(shapes: Mapping[str, tuple[int, ...]], world_size: int) -> tuple[tuple[str, ...], ...]:
    """Names for each rank, about equally many elements: the largest first, to whoever has least so far."""
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += sizes[name]
    return tuple(tuple(sorted(share)) for share in shares)
