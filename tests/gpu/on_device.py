"""What test_on_a_gpu.py runs in processes of their own: ``python -m tests.gpu.on_device WHAT`` prints JSON.

A process that has used CUDA cannot fork others that do, and other tests fork.
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist

from mtrl.checkpoint.optimizer_state import OptimizerState
from mtrl.memory import HostCopy
from mtrl.parallel.device import current_device
from mtrl.tools.bench import gpu_model, gpu_sizes
from mtrl.tools.group_check import COLLECTIVES, measure


def shelf() -> dict[str, Any]:
    """Bytes that torch has in use of the device around one put-away tensor; is it the same afterwards?"""
    device = current_device().torch_device
    whole = torch.randn(2**26, device=device)
    view, expected = whole[1000:2000].view(10, 100).T, whole.clone()
    found: dict[str, Any] = {"nbytes": whole.nbytes, "before": torch.cuda.memory_allocated()}
    one = HostCopy(lambda: [whole, view])
    for turn in range(2):
        one.offload()
        found[f"away {turn}"] = torch.cuda.memory_allocated()
        one.onload()
        found[f"back {turn}"] = torch.cuda.memory_allocated()
    found["equal"] = torch.equal(whole, expected)
    whole[1000] = 7.0
    found["is_view"] = float(view[0, 0]) == 7.0
    return found


def trainer_host_copies() -> dict[str, Any]:
    """Bytes in use around a trainer's parts put away; are weights and moments the same afterwards?"""
    groups = gpu_model.alone()
    way = gpu_sizes.Way(side="torch_native", precision="bf16")
    opened = gpu_model.open_mtrl(gpu_sizes.TINY, way, groups, like_everywhere=True)
    losses = [opened.step()]
    trainer = opened.trainer
    assert trainer is not None
    kept = {part: [each.clone() for each in trainer.held(part)] for part in ("weights", "optimizer")}
    copies = trainer.host_copies()
    storages = {
        each.untyped_storage()._cdata: each.untyped_storage().nbytes()
        for part in copies
        for each in trainer.held(part)
    }
    before = torch.cuda.memory_allocated()
    for each in copies.values():
        each.offload()
    away = torch.cuda.memory_allocated()
    for each in reversed(copies.values()):
        each.onload()
    equal = all(
        torch.equal(now, then)
        for part, tensors in kept.items()
        for now, then in zip(trainer.held(part), tensors, strict=True)
    )
    losses += [opened.step() for _ in range(2)]
    return {
        "held": sum(storages.values()), "before": before, "away": away, "equal": equal, "losses": losses,
        "back": torch.cuda.memory_allocated(),
    }  # fmt: skip


def host_steps() -> dict[str, Any]:
    """Losses of three steps by the share of the optimizer that the host steps; elements of masters and
    moments on the host, in all, and those that are offloaded between phases; bytes in use of the device.
    """
    groups = gpu_model.alone()
    way = gpu_sizes.Way(side="torch_native", precision="bf16")
    found: dict[str, Any] = {}
    for fraction in (0.0, 0.5, 1.0):
        opened = gpu_model.open_mtrl(gpu_sizes.TINY, way, groups, like_everywhere=True)
        trainer = opened.trainer
        assert trainer is not None
        trainer.settings = replace(trainer.settings, offload_fraction=fraction)
        trainer.start_phase(total_steps=1000, lr=trainer.settings.lr, warmup_steps=0)
        losses = [opened.step() for _ in range(3)]
        shards = OptimizerState.of(trainer.model, trainer.optimizer).shards
        state = [each for shard in shards for each in shard.tensors().values()]
        found[str(fraction)] = {
            "losses": losses,
            "host": sum(each.numel() for each in state if each.device.type == "cpu"),
            "all": sum(each.numel() for each in state),
            "on device": torch.cuda.memory_allocated(),
            # One for each; counts of steps have no dims.
            "held": sum({e.data_ptr(): e.numel() for e in trainer.held("optimizer") if e.dim()}.values()),
        }
        del opened, trainer, shards, state
        gc.collect()
    return found


def groups_of_one() -> dict[str, Any]:
    """Every collective on every group of one rank; which backend carries them."""
    made = gpu_model.alone()
    rows = [
        measure(f"{half}.{field.name}", collective, getattr(part, field.name))
        for half, part in (("attn", made.attn), ("ffn", made.ffn))
        for field in fields(part)
        for collective in COLLECTIVES
    ]
    return {"backend": dist.get_backend(made.attn.tp), "rows": rows}


WHATS: dict[str, Callable[[], dict[str, Any]]] = {
    "shelf": shelf,
    "trainer_host_copies": trainer_host_copies,
    "host_steps": host_steps,
    "groups_of_one": groups_of_one,
}

if __name__ == "__main__":
    answer = WHATS[sys.argv[1]]()
    gpu_model.leave()
    print(json.dumps(answer))
