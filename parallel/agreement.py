"""Ranks tell each other small things, and fail together: JSON over tensors, never pickles.

A rank that alone raises out of a collective operation leaves the others waiting. So work that may fail on
one rank (a disk that is full) is tried, and `agree` then raises on all ranks or on none.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.parallel.device import current_device
from mtrl.parallel.errors import CheckpointError, MtrlError, RolloutError

Group: TypeAlias = "dist.ProcessGroup | None"

Said: TypeAlias = tuple[bool, int]
"""Whether a rank failed, and a number it names."""

Tell: TypeAlias = Callable[[bool, int], list[Said]]
"""Says whether this rank failed, and a number, to all ranks; what every rank said, in rank order."""


def gather_json(value: Any, group: Group = None) -> list[Any]:
    """Every rank's value (JSON), in rank order. Collective over ``group`` (None: WORLD)."""
    text = json.dumps(value).encode()
    if not dist.is_initialized():
        return [json.loads(text)]
    rows = all_gather_ragged(torch.frombuffer(bytearray(text), dtype=torch.uint8), group)
    return [json.loads(row.numpy().tobytes()) for row in rows]


def all_gather_ragged(values: Tensor, group: Group = None) -> list[Tensor]:
    """Every rank's 1-d tensor, in rank order; lengths may differ. Collective over ``group`` (None: WORLD)."""
    on_cpu = group is not None and dist.get_backend(group) == "gloo"
    device = torch.device("cpu") if on_cpu else current_device().torch_device
    length = torch.tensor([values.numel()], dtype=torch.int64, device=device)
    lengths = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, length, group=group)
    padded = torch.zeros(max(1, int(lengths.max())), dtype=values.dtype, device=device)
    padded[: values.numel()] = values.to(device)
    gathered = torch.empty(len(lengths) * padded.numel(), dtype=values.dtype, device=device)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    gathered = gathered.view(len(lengths), -1)
    return [row[:size].cpu() for row, size in zip(gathered, lengths.tolist(), strict=True)]


def agree(error: Exception | None, group: Group = None, *, kind: type[MtrlError] = CheckpointError) -> None:
    """Raise on every rank if any rank passes an error. Collective over ``group`` (None: WORLD).

    Raises:
        MtrlError: this rank's own error, if it is one of mtrl's; else one of ``kind``, with the ranks that
            failed and what the first of them said.
    """
    said = gather_json(None if error is None else _words(error), group)
    failed = [rank for rank, words in enumerate(said) if words is not None]
    if not failed:
        return
    if isinstance(error, MtrlError):
        raise error
    raise kind(f"{_ranks(failed, len(said))}{said[failed[0]]}") from error


def tell_all(failed: bool, number: int) -> list[Said]:
    """What every rank says, in rank order. Collective over WORLD."""
    own = torch.tensor([failed, number], dtype=torch.int64, device=current_device().torch_device)
    rows = torch.empty(dist.get_world_size() * 2, dtype=torch.int64, device=own.device)
    dist.all_gather_into_tensor(rows, own)
    return [(bool(failed), number) for failed, number in rows.view(-1, 2).tolist()]


def agree_on(number: int, what: str, error: Exception | None = None, tell: Tell = tell_all) -> None:
    """`agree` in one small exchange where all is well, and all ranks pass the same ``number``.

    Collective over WORLD; ``tell`` may be another way than a collective of torch.distributed.

    Raises:
        RolloutError: on all ranks, when the numbers differ.
    """
    said = tell(error is not None, number)
    if any(failed for failed, _ in said):
        agree(error, kind=RolloutError)
    numbers = [number for _, number in said]
    if len(set(numbers)) > 1:
        raise RolloutError(f"ranks have different {what}: {numbers}, in rank order")


def _words(error: Exception) -> str:
    if isinstance(error, MtrlError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return repr(error)


def _ranks(failed: Sequence[int], world_size: int) -> str:
    if world_size == 1:
        return ""
    return f"{'ranks' if len(failed) > 1 else 'rank'} {', '.join(map(str, failed))}: "
