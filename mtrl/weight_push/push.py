"""Push the trainer's weights into the rollout engine after an update: the fewest bytes, and few calls.

Planned once (``plan.py``): what an engine's shard reads is recorded from vLLM's own loader, what a rank lacks
of it comes from one other rank, and everything is prepared as views of live tensors. A push is, for each
bucket, one fused copy into it, one ``all_to_all_single``, one fused copy out of it; and one fused copy of all
that a rank has itself. Rank r receives exactly the elements of need(r) minus have(r), counted by the
transport.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.models.builder import Model
from mtrl.models.gather import DTYPES
from mtrl.models.transfers import TransferPlan
from mtrl.rollout.vllm_engine import VllmEngine
from mtrl.weight_push.plan import Needs, Round, Views, exchange_needs, make_rounds, plan_push

BUCKET_BYTES = 256 * 2**20


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a push moved on this rank: bytes received, added up by the transport; calls made for it."""

    bytes_received: int = 0
    num_rounds: int = 0


class WeightPush:
    """A planned push from one model into one engine, which has its weights' record taken here.

    Built collectively over WORLD. The parameters of both sides keep their storage from then on.
    """

    def __init__(
        self, model: Model, engine: VllmEngine, dtype: torch.dtype, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._engine, self.counts = engine, Counts()
        shapes = model.weight_map.hf_shapes()
        record = engine.plan_weights(shapes)
        needs = Needs.of(record)
        self.staging = {
            name: torch.empty(shapes[name], dtype=dtype, device=engine.device) for name in needs.whole
        }
        self._views = Views(model, needs, engine.placed, self.staging)
        everyones = exchange_needs(needs)
        kept = {name: DTYPES[each] for name, each in model.weight_map.hf_dtypes().items()}
        plan = plan_push(model.weight_map, everyones)
        self.plan = plan
        self._rounds: list[Round] = []
        for wire in dict.fromkeys([dtype, *kept.values()]):
            part = TransferPlan(transfers=tuple(t for t in plan.transfers if kept.get(t.name, dtype) == wire))
            self._rounds += make_rounds(
                part,
                self._views,
                wire,
                rank=model.groups.rank,
                world_size=model.groups.layout.world_size,
                bucket_bytes=bucket_bytes,
            )

    def run(self, *, policy_version: int) -> int:
        """Push, and make ``policy_version`` the engine's version. Collective over WORLD.

        Returns:
            Bytes that this rank received from other ranks.
        """
        before = self.counts.bytes_received
        with self._engine.receiving(policy_version=policy_version), torch.no_grad():
            for each in self._rounds:
                self._exchange(each)
            self._engine.replay(self.staging)
        return self.counts.bytes_received - before

    def _exchange(self, each: Round) -> None:
        _copy(each.local)
        if each.travels:
            _copy(each.outgoing)
            dist.all_to_all_single(each.received, each.sent, each.receive_sizes, each.send_sizes)
            self.counts.bytes_received += each.received.numel() * each.received.element_size()
            _copy(each.incoming)
        self.counts.num_rounds += 1


def _copy(pairs: tuple[list[Tensor], list[Tensor]]) -> None:
    """All copies of a list in one call; dtypes may differ."""
    if pairs[0]:
        torch._foreach_copy_(pairs[0], pairs[1])
