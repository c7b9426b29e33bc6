"""Parameters that Transformer Engine keeps in FP8, to those who read and write weights.

Such a parameter has no elements of bf16 that a view could share: it is read as a copy of what its numbers
stand for, and written whole. Its source of truth is the optimizer's fp32 master. Masters begin as the bf16
that was loaded, not as what FP8 made of it, and a checkpoint holds them, rounded to bf16: a run that resumes
has the same numbers in FP8, and what other programs read of it does not depend on how it was trained.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mtrl.parallel.megatron_ready  # noqa: F401

from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@dataclass(slots=True)
class Fp8Parameters:
    """What is known of a model's parameters in FP8 besides their numbers: the optimizer that has their
    masters, and, inside `masters_shown`, the masters by parameter.
    """

    optimizer: Any = None
    shown: dict[int, Tensor] = field(default_factory=dict)

    def read(self, parameter: Tensor) -> Tensor:
        """``parameter`` itself, or, of one in FP8, a copy of its values in its nominal dtype."""
        if not is_float8tensor(parameter):
            return parameter
        found = self.shown.get(id(parameter))
        return parameter.detach().dequantize() if found is None else found

    @contextmanager
    def masters_shown(self) -> Iterator[None]:
        """Inside, `read` gives masters, rounded to the nominal dtype. Collective over data parallel ranks,
        each of which has a share of each master; takes as much memory as the parameters would in that dtype.
        """
        optimizer = self.optimizer
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self.shown = {
            key: value
            for part in parts
            if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer
            for key, value in _whole_masters(part)
        }
        try:
            yield
        finally:
            self.shown = {}


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of a model's parameters in FP8, for views that outlast a step; each with its parameter."""

    pairs: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def among(cls, parameters: Mapping[Any, Tensor], read: Mapping[Any, Tensor]) -> "Copies":
        """Of ``read``, what `Fp8Parameters.read` gave of ``parameters``, those that are copies."""
        return cls(tuple((read[key], each) for key, each in parameters.items() if is_float8tensor(each)))

    def renew(self) -> None:
        """Have them say what the parameters say now: what the model's products multiply by."""
        for copy, parameter in self.pairs:
            copy.copy_(parameter.detach().dequantize())

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(copy.nbytes for copy, _ in self.pairs)


def write(parameters: Mapping[Any, Tensor], values: Mapping[Any, Tensor]) -> None:
    """Make the parameters in FP8 their values, where their masters begin too; the others are their own."""
    for key, parameter in parameters.items():
        if is_float8tensor(parameter):
            with torch.no_grad():
                parameter.copy_(values[key])
            _begin_master(parameter, values[key])


def _begin_master(parameter: Any, value: Tensor) -> None:
    """Have Megatron's optimizer begin ``parameter``'s master at ``value``, on the host until then."""
    held = [value.detach().cpu()]

    def get() -> Tensor:
        return held[0] if held else parameter.detach().dequantize()

    # Megatron asks for these by name, as Transformer Engine's `fp8_model_init` would have set them.
    parameter.get_high_precision_init_val = get
    parameter.clear_high_precision_init_val = held.clear


def _whole_masters(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    """Of one of Megatron's optimizers: each parameter in FP8, by id, with its whole master."""
    places = optimizer.model_param_group_index_map
    for buffer in optimizer.buffers:
        for parameter in filter(is_float8tensor, buffer.params):
            whole = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if parameter in places:
                group, order = places[parameter]
                own = optimizer._get_model_param_range_map(parameter)["param"]
                master = optimizer.optimizer.param_groups[group]["params"][order]
                whole.view(-1)[own.start : own.end] = master.detach().to(parameter.dtype)
            # Shares do not overlap, so the sum adds zeros.
            dist.all_reduce(whole, group=optimizer.data_parallel_group)
            yield id(parameter), whole
