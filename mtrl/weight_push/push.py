"""Push the trainer's weights into the rollout engine after an update: the fewest bytes, and few calls.

Planned once: what an engine's shard reads is recorded from vLLM's own loader (``plan.py``), what a rank lacks
of it comes from one other rank, over a network card once for each node (``nodes.py``), and everything is
prepared as views of live tensors. A push is one fused copy of all that a rank has itself, and then either one
into the other ranks' engines, which it has mapped (``windows.py``), or, for each round, one into its bucket,
an exchange and one out of it (``rounds.py``). Rank r receives exactly the elements of need(r) minus have(r),
counted in each push (``transport.py``). What the engine keeps in FP8 is quantised before it travels
(``fp8_images.py``).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mtrl.models.builder import Model
from mtrl.models.fp8_parameters import Copies as Fp8Copies
from mtrl.models.gather import DTYPES
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.errors import LostRanksError, RolloutError
from mtrl.rollout.fp8_weights import fp8_dtypes, fp8_names, with_scales
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.loader_record import LoaderRecord
from mtrl.rollout.storages import StorageWatch
from mtrl.weight_push.copies import Copies
from mtrl.weight_push.fp8_images import Fp8Images, PartsPlan
from mtrl.weight_push.plan import Needs, exchange_needs, plan_push, sendable_boxes
from mtrl.weight_push.rounds import Round, Rounds, make_rounds
from mtrl.weight_push.transport import (
    CollectiveTransport,
    SharedMemoryTransport,
    Transport,
    TransportName,
    choose,
)
from mtrl.weight_push.verify import Checksums
from mtrl.weight_push.views import Views
from mtrl.weight_push.windows import make_writes, open_windows

BUCKET_BYTES = 256 * 2**20


@dataclass(slots=True, kw_only=True)
class Counts:
    """What pushes moved on this rank: bytes received, added up by the transport, and those of them that came
    from other nodes; rounds made for it.
    """

    bytes_received: int = 0
    bytes_across: int = 0
    num_rounds: int = 0


class WeightPush:
    """A planned push from one model into one engine, which has its weights' record taken here.

    Built collectively over WORLD. The parameters of both sides keep their storage from then on: pushes
    look, and refuse when they have not; one that is planned later may move the engine's.
    ``bucket_bytes`` bounds what is allocated for travel, unless one tensor is larger, and for quantising;
    where ranks write to each other's engines travel takes nothing. ``num_verified`` first pushes compare
    checksums of what was sent and of what the engine holds; ``node_of`` is each rank's node, torchrun's
    unless given.
    """

    def __init__(
        self,
        model: Model,
        engine: InPlaceEngine,
        dtype: torch.dtype,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        transport: TransportName = "auto",
        num_verified: int = 0,
        node_of: list[int] | None = None,
    ) -> None:
        self._model, self._engine, self.counts = model, engine, Counts()
        fp8 = fp8_names(model.weight_map.config) if engine.has_fp8_weights else ()
        shapes = with_scales(model.weight_map.hf_shapes(), fp8)
        kept = {name: DTYPES[each] for name, each in model.weight_map.hf_dtypes().items()} | fp8_dtypes(fp8)
        record = engine.plan_weights(shapes, fp8_dtypes(fp8))
        needs = Needs.of(record)
        self.staging = {
            name: torch.empty(shapes[name], dtype=kept.get(name, dtype), device=engine.device)
            for name in needs.whole
        }
        tensors, parameters = model.tensors(), model.parameters()
        self._copies = Fp8Copies.among(parameters, tensors)
        views = Views(needs=needs, placed=engine.placed, staging=self.staging, model=model, tensors=tensors)
        everyones = exchange_needs(needs)
        self._rank = model.groups.rank
        self._nodes = node_of or gather_json(int(os.environ.get("GROUP_RANK", "0")))
        self.plan = plan_push(model.weight_map, everyones, self._nodes, fp8=fp8)
        self.transport: Transport = choose(transport, engine.device)
        self.remark = ""
        """Why it goes another way than was asked for; empty where it does not."""
        self._buckets = (
            self.transport if isinstance(self.transport, CollectiveTransport) else CollectiveTransport()
        )
        rounds = partial(
            make_rounds,
            transport=self._buckets,
            rank=self._rank,
            world_size=model.groups.layout.world_size,
            bucket_bytes=bucket_bytes // 2,  # one to send from and one to receive into
            device=engine.device,
            pack=engine.block_packer(),
        )
        self._images, told = None, Rounds()
        if fp8:
            parts = PartsPlan(self.plan, sendable_boxes(model.weight_map, fp8), fp8, self._nodes)
            self._images = Fp8Images(
                parts, views.held, rank=self._rank, scratch_bytes=bucket_bytes, device=engine.device
            )
            told = rounds(parts.largest, self._images, dtype_of=lambda name: torch.float32)
            views.images = self._images.images
        made = self._writes(views, record, is_must=transport == "shared_memory")
        made = made or rounds(self.plan, views, dtype_of=lambda name: kept.get(name, dtype))
        self._told, self._local, self._rounds = told, made.local, made.rounds
        self._checksums, self._num_verified = Checksums(self.plan, views, dtype), num_verified
        own = {f"{key[1]} (chunk {key[0]})": p for key, p in parameters.items() if tensors[key] is p}
        live = [*((own, name) for name in own), *engine.live_parameters()]
        self._watch = StorageWatch(live)

    @property
    def allocated_bucket_bytes(self) -> int:
        """Memory of this rank's buckets."""
        return self._buckets.num_bytes

    @property
    def extra_bytes(self) -> int:
        """Memory that this rank keeps for pushes: buckets, tensors that are replayed whole, its share in FP8
        for engines that want that, in bf16 of parameters that are in FP8.
        """
        staged = sum(tensor.nbytes for tensor in self.staging.values())
        images = self._images.num_bytes if self._images else 0
        return self.allocated_bucket_bytes + staged + images + self._copies.num_bytes

    def run(self, *, policy_version: int) -> int:
        """Push, and make ``policy_version`` the engine's version. Collective over WORLD.

        Returns:
            Bytes that this rank received from other ranks.

        Raises:
            RolloutError: on all ranks: it failed on one, or their versions differ; the engine then refuses
                to sample.
            WeightError: on all ranks: a checksum differs.
        """
        before = self.counts.bytes_received
        check = self._check if self._num_verified > 0 else None
        self._engine.update(self._write, policy_version=policy_version, check=check, tell=self.transport.tell)
        self._num_verified -= 1
        return self.counts.bytes_received - before

    def _writes(self, views: Views, record: LoaderRecord, *, is_must: bool) -> Rounds | None:
        """The plan as writes to other ranks' engines; None where it is to go through buckets.

        An engine whose weights cannot lie where others map them is an error only if this way is a must.
        """
        if not isinstance(self.transport, SharedMemoryTransport):
            return None
        travelling = [
            each
            for each in (*self.plan.first.transfers, *self.plan.forwarded.transfers)
            if each.source != each.target
        ]
        names = {each.name for each in travelling if each.target == self._rank}
        try:
            windows = open_windows(self._engine, record, self.staging, names) if travelling else {}
        except RolloutError as error:
            if is_must:
                raise
            self.transport, self.remark = self._buckets, f"weights are pushed through buckets: {error}"
            return None
        return make_writes(
            self.plan,
            views,
            windows,
            transport=self.transport,
            rank=self._rank,
            world_size=len(self._nodes),
            pack=self._engine.block_packer(),
        )

    def _write(self) -> None:
        """All copies and exchanges; whatever fails on this rank, it takes part in every exchange."""
        error: Exception | None = None
        for step in self._steps():
            try:
                step()
            except LostRanksError:
                raise
            except Exception as caught:  # raised below, when the other ranks need this one no more
                error = error or caught
        if error is not None:
            raise error
        self._engine.replay(self.staging)

    def _steps(self) -> Iterator[Callable[[], None]]:
        yield partial(self._watch.check, every=self._num_verified > 0)
        yield self._copies.renew
        if self._images is not None:
            yield self._images.measure
            yield self._told.local.run
            yield from (partial(self._exchange, each) for each in self._told.rounds)
            yield self._images.quantise
        yield self._local.run
        yield from (partial(self._exchange, each) for each in self._rounds)

    def _exchange(self, each: Round) -> None:
        failed = _attempt(each.before)
        try:
            arrived = each.exchange()
        except RuntimeError as error:  # of torch.distributed or pipes: a rank has died, or gone another way
            raise LostRanksError(f"the push lost other ranks: {error}") from error
        self.counts.bytes_received += sum(arrived)
        self.counts.bytes_across += sum(
            num_bytes
            for num_bytes, node in zip(arrived, self._nodes, strict=True)
            if node != self._nodes[self._rank]
        )
        failed = failed or _attempt(each.after)
        self.counts.num_rounds += 1
        if failed is not None:
            raise failed

    def _check(self) -> None:
        replayed = [name for name, tensor in self.staging.items() if not self._engine.holds(name, tensor)]
        self._checksums.check(replayed)


class _CopyFailed(RolloutError):
    """A copy of this rank failed."""


def _attempt(copies: Copies) -> _CopyFailed | None:
    try:
        copies.run()
    except RuntimeError as error:
        return _CopyFailed(f"a copy of the push failed: {error}")
    return None
