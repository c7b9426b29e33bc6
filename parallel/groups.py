"""Megatron's process groups for one layout, typed, with attention's and the experts' apart.

``RankLayout`` -> ``parallel_state.initialize_model_parallel`` -> `ParallelGroups`. This is the one place that
feeds what in Megatron still reads globals. Every group Megatron made is compared with the pure list of the
layout, so a rank order that changes upstream is an error here and not a wrong gradient later.
"""

import os
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from mtrl.parallel import host, megatron_mends
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import AxisName, RankCoordinates, RankLayout, check_world_size

host.install()
megatron_mends.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

DEFAULT_TIMEOUT_S = 1800.0
_LOOPBACK = "127.0.0.1"

# Megatron's name for each group and the axes it spans; `create` checks them all.
_SPANS: dict[str, tuple[AxisName, ...]] = {
    "tp": ("attn.tp",),
    "cp": ("attn.cp",),
    "pp": ("attn.pp",),
    "dp": ("attn.dp",),
    "dp_cp": ("attn.cp", "attn.dp"),
    "intra_dp_cp": ("attn.cp", "attn.dp"),
    "tp_cp": ("attn.tp", "attn.cp"),
    "tp_dp_cp": ("attn.tp", "attn.cp", "attn.dp"),
    "mp": ("attn.tp", "attn.pp"),
    "expt_tp": ("ffn.etp",),
    "ep": ("ffn.ep",),
    "expt_dp": ("ffn.edp",),
    "intra_expt_dp": ("ffn.edp",),
    "tp_ep": ("ffn.etp", "ffn.ep"),
    "tp_ep_pp": ("ffn.etp", "ffn.ep", "ffn.pp"),
    "intra_dist_opt": ("attn.tp", "attn.cp", "attn.dp", "attn.pp"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttnGroups:
    """This rank's groups for everything that is not an expert; ``dp_cp`` is where gradients are reduced."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnGroups:
    """This rank's groups for expert weights; ``edp`` is where their gradients are reduced."""

    etp: dist.ProcessGroup
    ep: dist.ProcessGroup
    pp: dist.ProcessGroup
    edp: dist.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroups:
    """One rank's place in a layout, with its process groups.

    ``collection`` is what Megatron's constructors take as ``pg_collection``. ``attn.pp`` and ``ffn.pp`` are
    the same group.
    """

    layout: RankLayout
    rank: int
    coordinates: RankCoordinates
    attn: AttnGroups
    ffn: FfnGroups
    collection: ProcessGroupCollection


def init_distributed(timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Start torch.distributed with this device's backend from torchrun's environment; alone without it.

    Traffic stays on the loopback interface unless MASTER_ADDR names another. A later call changes nothing.
    Collective over all processes of the job.
    """
    if dist.is_initialized():
        return
    device = current_device()
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:
        dist.init_process_group(device.comm_backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    os.environ.setdefault("MASTER_ADDR", _LOOPBACK)
    if os.environ["MASTER_ADDR"] in (_LOOPBACK, "localhost"):
        # Gloo otherwise listens on whatever address the host's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    dist.init_process_group(device.comm_backend, timeout=timeout)


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")


def create(
    layout: RankLayout, *, virtual_pipeline_size: int | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> ParallelGroups:
    """Make Megatron's process groups for ``layout`` and check every one of them. Collective over WORLD.

    ``virtual_pipeline_size`` is the number of model chunks a rank holds; None or 1 means one.

    Raises:
        LayoutError: the layout is for another world size; groups exist already; or Megatron's ranks differ.
    """
    if not dist.is_initialized():
        raise LayoutError("torch.distributed is not started; call init_distributed() before create()")
    check_world_size(layout.spec, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        raise LayoutError("Megatron's process groups exist already; call destroy() before create()")
    attn, ffn = layout.spec.attn, layout.spec.ffn
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=attn.tp,
        pipeline_model_parallel_size=attn.pp,
        virtual_pipeline_model_parallel_size=None if virtual_pipeline_size == 1 else virtual_pipeline_size,
        context_parallel_size=attn.cp,
        expert_model_parallel_size=ffn.ep,
        # Always passed: Megatron's default is the attention's tp, the allocation string's is 1.
        expert_tensor_parallel_size=ffn.etp,
        distributed_timeout_minutes=timeout_s / 60,
        # For Megatron's own checkpoints, which mtrl does not write.
        create_gloo_process_groups=False,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    _check(layout, collection)
    return _as_groups(layout, collection)


def _check(layout: RankLayout, collection: Any) -> None:
    rank = dist.get_rank()
    for name, axes in _SPANS.items():
        expected = next(group for group in layout.product_groups(*axes) if rank in group)
        group = getattr(collection, name)
        found = tuple(dist.get_process_group_ranks(group))
        if found != expected:
            raise LayoutError(
                f"rank {rank}: Megatron's group {name} holds ranks {list(found)}, "
                f"{layout.spec} says {list(expected)} for {' x '.join(axes)}"
            )


def _as_groups(layout: RankLayout, collection: Any) -> ParallelGroups:
    rank = dist.get_rank()
    return ParallelGroups(
        layout=layout,
        rank=rank,
        coordinates=layout.coordinates(rank),
        attn=AttnGroups(
            tp=collection.tp,
            cp=collection.cp,
            pp=collection.pp,
            dp=collection.dp,
            dp_cp=collection.dp_cp,
        ),
        ffn=FfnGroups(etp=collection.expt_tp, ep=collection.ep, pp=collection.pp, edp=collection.expt_dp),
        collection=collection,
    )


def destroy() -> None:
    """Destroy Megatron's process groups and forget its globals; WORLD stays. Collective over WORLD.

    Does nothing where `create` was not called.
    """
    made: Sequence[Any] = parallel_state._global_process_group_list or ()
    members = [group for group in made if group is not None]
    parallel_state.destroy_model_parallel()
    for group in members:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def seed_everything(seed: int, groups: ParallelGroups) -> None:
    """Seed Python, NumPy, torch and Megatron's RNG tracker.

    Pipeline stages draw different numbers; ranks of one stage the same, except inside Megatron's
    tensor-parallel and expert-parallel forks, which differ by tp and by (ep, etp).
    """
    stage_seed = seed + 100 * groups.coordinates.pp
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        stage_seed,
        tp_rank=groups.coordinates.tp,
        ep_rank=groups.coordinates.ep,
        etp_rank=groups.coordinates.etp,
        force_reset_rng=True,
    )
