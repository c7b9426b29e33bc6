"""Live weights in memory that other processes map too: on CPUs a file in memory, on GPUs CUDA IPC.

They write to them as if they were their own; nothing is copied.
"""

import base64
import gc
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mtrl.parallel.errors import RolloutError
from mtrl.parallel.one_machine import map_file, memory_file

Shared: TypeAlias = dict[str, Any]
"""JSON. ``size`` in bytes where all storages are one file, ``ipc`` where each is opened with CUDA IPC;
``tensors`` by name: which storage, dtype, shape, stride and offset in elements.
"""

_ALIGNMENT = 64


def share_weights(tensors: Mapping[str, Tensor]) -> tuple[Shared, list[int]]:
    """Have these tensors, and all that share storage with them, in memory that `map_weights` finds.

    Returns what describes it, and descriptors of files that go with it, to be closed once they are mapped.
    On CPUs storages are moved, so nothing but tensors may refer to them.

    Raises:
        RolloutError: there is no memory for it, or something else refers to a storage; none was moved then.
    """
    if next(iter(tensors.values())).device.type == "cuda":
        return _exported(tensors), []
    return _moved(tensors)


def map_weights(
    shared: Shared, descriptors: Sequence[int], pid: int | Literal["self"] = "self"
) -> dict[str, Tensor]:
    """The same tensors in this process, by descriptors of its own, or of the process ``pid``."""
    device = torch.device(shared["device"])
    if device.type == "cpu":
        whole = [(0, shared["size"])]
        storages = [map_file(pid, number, whole)[0].untyped_storage() for number in descriptors]
    else:
        torch.cuda.init()
        storages = [torch.UntypedStorage._new_shared_cuda(*map(_from_json, each)) for each in shared["ipc"]]
    return {
        name: torch.empty(0, dtype=getattr(torch, dtype), device=device).set_(
            storages[number], offset, tuple(shape), tuple(stride)
        )
        for name, (number, dtype, shape, stride, offset) in shared["tensors"].items()
    }


def _moved(tensors: Mapping[str, Tensor]) -> tuple[Shared, list[int]]:
    old = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors.values()}
    names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}
    users = _users(old)
    for key, name in names.items():
        if torch._C._storage_Use_Count(key) > len(users[key]) + 1:
            raise RolloutError(
                f"{name} is held by more than tensors, so its memory cannot be shared; use "
                "rollout.process=trainer with rollout.push_transport=auto"
            )
    starts, size = {}, 0
    for key, storage in old.items():
        starts[key] = size
        size += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
    number = -1
    try:
        number = memory_file(size)
        # Each is a storage of its own still: by them vLLM's loader is followed to where it writes.
        parts = [(start, old[key].nbytes()) for key, start in starts.items()]
        new = dict(zip(starts, map_file("self", number, parts), strict=True))
    except (OSError, MemoryError) as error:
        if number >= 0:
            os.close(number)
        raise RolloutError(
            f"an engine could not allocate {size} bytes of shared memory for its weights: {error}; free "
            "memory, or use rollout.process=trainer with rollout.push_transport=auto"
        ) from error
    where = {
        name: _place(tensor, starts[tensor.untyped_storage()._cdata]) for name, tensor in tensors.items()
    }
    for key, to in new.items():
        to.copy_(torch.empty(0, dtype=torch.uint8).set_(old.pop(key)))
        for user in users.pop(key):
            user.data = torch.empty(0, dtype=user.dtype).set_(
                to.untyped_storage(), user.storage_offset(), tuple(user.shape), user.stride()
            )
    return {"device": "cpu", "size": size, "tensors": where}, [number]


def _users(storages: Mapping[int, object]) -> dict[int, list[Tensor]]:
    """All tensors of this process that live in these storages, by storage."""
    found: dict[int, list[Tensor]] = {key: [] for key in storages}
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()  # vLLM hides what it has made from the collector
    try:
        gc.collect()
        for each in gc.get_objects():
            if (
                issubclass(type(each), Tensor)
                and each.layout is torch.strided
                and each.device.type == "cpu"
                and (key := each.untyped_storage()._cdata) in found
            ):
                found[key].append(each)
    finally:
        if was_frozen:
            gc.freeze()
    return found


def _place(tensor: Tensor, start: int) -> tuple[int, str, tuple[int, ...], tuple[int, ...], int]:
    offset = start // tensor.itemsize + tensor.storage_offset()
    return 0, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride(), int(offset)


def _exported(tensors: Mapping[str, Tensor]) -> Shared:
    """Not run yet: what another process opens with CUDA IPC; this one must keep the tensors."""
    numbers: dict[int, int] = {}
    ipc: list[list[Any]] = []
    where = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage._cdata not in numbers:
            numbers[storage._cdata] = len(ipc)
            ipc.append([_to_json(each) for each in storage._share_cuda_()])
        where[name] = (numbers[storage._cdata], *_place(tensor, 0)[1:])
    device = str(next(iter(tensors.values())).device)
    return {"device": device, "ipc": ipc, "tensors": where}


def _to_json(value: Any) -> Any:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value
