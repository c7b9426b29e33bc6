"""Engines whose live weights this process can write to: what a push and a training loop use of them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.batch import Completion, Prompt
from mtrl.parallel.agreement import Tell, agree_on, tell_all
from mtrl.parallel.errors import LostRanksError, RolloutError, WeightError
from mtrl.parallel.spec import RolloutSpec
from mtrl.rollout.kernel_layout import KernelLayout, PackBlocks, Ranges
from mtrl.rollout.loader_record import LoaderRecord, RecordedCopy
from mtrl.rollout.places import Placed, Places
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.shared_weights import Shared, share_weights


class InPlaceEngine(ABC):
    """This rank's share of one of ``spec.dp`` engines of ``spec.tp`` ranks each, and its live weights.

    Ranks ``i*tp .. i*tp+tp-1`` are replica ``i``.
    """

    def __init__(self, *, spec: RolloutSpec, places: Places, has_fp8_weights: bool) -> None:
        self._spec, self._places, self._has_fp8_weights = spec, places, has_fp8_weights
        self._policy_version: int | None = None
        self._shared: tuple[Shared, list[int]] | None = None

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int
    ) -> list[Completion]:
        """See `RolloutEngine.generate`."""

    @abstractmethod
    def plan_weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> LoaderRecord:
        """What this rank needs of Hugging Face tensors of these shapes. Collective over the replica.

        They are of the engine's dtype, or what ``dtypes`` says. WeightError when a name is unknown or
        missing.
        """

    @property
    @abstractmethod
    def loader_record(self) -> LoaderRecord | None:
        """What this rank needs of each Hugging Face tensor; None before weights were planned or loaded."""

    @abstractmethod
    def live_parameters(self) -> list[tuple[Mapping[str, Tensor], str]]:
        """What of this process must not be replaced: each a mapping and its key there."""

    @abstractmethod
    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU; without a push this engine then refuses to sample."""

    @abstractmethod
    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory for ``part`` again, at the same addresses."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free the engine's memory and groups; torch.distributed and the trainer's groups stay."""

    @property
    @abstractmethod
    def is_shut_down(self) -> bool:
        """Whether it was."""

    def block_packer(self) -> PackBlocks | None:
        """What packs experts' blocks, where there are such and this process has the kernel."""
        return None

    @abstractmethod
    def paused(self, write: Callable[[], None]) -> None:
        """Run ``write`` with vLLM's scheduler paused and its prefix cache emptied."""

    def void(self) -> None:
        """Have it refuse to sample until weights are whole."""
        self._policy_version = None

    def accept(self, policy_version: int) -> None:
        """Its weights are whole, and of this version."""
        self._policy_version = policy_version

    def host_bytes_elsewhere(self) -> int:
        """Largest resident memory of another process that this engine lives in."""
        return 0

    @property
    def replica_index(self) -> int:
        """Which of the spec's dp engines this rank belongs to."""
        return dist.get_rank() // self._spec.tp

    @property
    def num_replicas(self) -> int:
        """How many engines there are; prompts are dealt out among them by the caller."""
        return self._spec.dp

    @property
    def engine_rank(self) -> int:
        """This rank's place within its engine; all of an engine's ranks return the same completions."""
        return dist.get_rank() % self._spec.tp

    @property
    def policy_version(self) -> int:
        """Version of the weights the engine holds; RolloutError while it holds none that are whole."""
        if self._policy_version is None:
            raise RolloutError(
                "the engine holds no weights: its first load_weights is missing, or the last one failed"
            )
        return self._policy_version

    @property
    def destinations(self) -> Mapping[str, Tensor]:
        """This rank's live weights, by vLLM's names; they keep their storage."""
        return self._places.destinations

    @property
    def layouts(self) -> Mapping[str, KernelLayout]:
        """The order in which kernels keep some of them."""
        return self._places.layouts

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.destinations.values())).device

    @property
    def has_fp8_weights(self) -> bool:
        """Whether linears' weights are kept in FP8 blocks, each with its scales."""
        return self._has_fp8_weights

    def shared(self) -> tuple[Shared, list[int]]:
        """Its live weights, for `map_weights` in other processes of this machine, and the files that go with
        it, open until it is shut down.

        Raises:
            RolloutError: see `share_weights`.
        """
        if self._shared is None:
            self._shared = share_weights(self.destinations)
        return self._shared

    def close_shared(self) -> None:
        """Let nobody map them any more."""
        for each in self._shared[1] if self._shared else ():
            os.close(each)
        self._shared = None

    def placed(self, copy: RecordedCopy, ranges: Ranges) -> Iterator[Placed]:
        """See `Places.placed`."""
        return self._places.placed(copy, ranges)

    def replay(self, tensors: Mapping[str, Tensor]) -> None:
        """Write full tensors to all their places, as vLLM's loader would.

        Raises:
            WeightError: there is none for it: the engine was asked for other weights since.
        """
        for name, tensor in tensors.items():
            if not self._places.has_place_for(name):
                raise WeightError(f"the engine has no place for {name} any more; make a new WeightPush")
            self._places.replay(name, tensor)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether all places of a full tensor have its elements."""
        return self._places.holds(name, tensor)

    def update(
        self,
        write: Callable[[], None],
        *,
        policy_version: int,
        check: Callable[[], None] | None = None,
        tell: Tell = tell_all,
    ) -> None:
        """Let ``write`` change the live weights in place; they are then of ``policy_version``.

        Collective over WORLD. ``write`` runs even where vLLM fails before it: other ranks may wait for this
        one in there. ``check`` runs after; until all ranks are done with it, and after an error, the engine
        refuses to sample.

        Raises:
            RolloutError: on all ranks, when a rank failed or versions differ.
        """
        if self.is_shut_down:
            raise RolloutError("the engine was shut down; it takes no weights")
        self.void()
        error: Exception | None = None
        part = _Once(write)
        for attempt in (partial(self.paused, part), part):
            try:
                attempt()
            except LostRanksError:
                raise
            except Exception as caught:  # told to all ranks at once
                error = error or caught
        agree_on(policy_version, "policy versions", error, tell)
        if check is not None:
            check()
        self.accept(policy_version)


class _Once:
    """A function that is called once, however often it is asked for."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            with torch.no_grad():
                function()
