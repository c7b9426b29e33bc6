"""One optimizer step on Megatron: schedule, DDP, distributed optimizer, learning rate.

``Trainer`` owns everything that changes in training. A *phase* is a stretch of steps with one learning
rate schedule and fresh optimizer state (the SFT warm start and GRPO are two phases of one run).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.adam import adams_of, optimizer_config, parts_of
from mtrl.config_engines import Decay, OptimizerSection, RouterSection
from mtrl.memory import HostCopy, Part
from mtrl.models.builder import Model
from mtrl.models.router import RouterLosses, RouterReport, Routers
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import NonFiniteError
from mtrl.policy import Loss, Microbatch, Policy, Sums

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did. ``loss`` is the mean over trained tokens of the global batch.

    ``sums`` are what the loss reports by name, joined over all microbatches and ranks; ``grad_norm`` is the
    global norm before clipping; ``lr`` is the rate this step used. ``loss`` leaves out what ``router``
    reports, the losses of routers; None where there are none.
    """

    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    sums: dict[str, float]
    router: RouterReport | None = None


class Trainer:
    """Wraps a model's chunks in Megatron's DDP and steps its optimizer.

    Every method is collective over WORLD: all ranks call it, each with its own microbatches and all
    with equally many.
    """

    def __init__(
        self,
        model: Model,
        settings: OptimizerSection,
        *,
        router: RouterSection | None = None,
        temperature: float = 1.0,
        deterministic: bool = False,
    ) -> None:
        self.model, self.settings = model, settings
        config = model.transformer_config
        self.routers = _routers(model, router or RouterSection())
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.params_dtype != torch.float64,
            use_distributed_optimizer=settings.distributed,
            overlap_grad_reduce=False,
            fp8_param_gather=config.fp8_param,
        )
        self.chunks = [
            DistributedDataParallel(
                config=config,
                ddp_config=ddp_config,
                module=chunk,
                # As in Megatron-LM: later chunks' gradients come first, one bucket each is best.
                disable_bucketing=number > 0,
                pg_collection=model.groups.collection,
            )
            for number, chunk in enumerate(model.chunks)
        ]
        config.finalize_model_grads_func = partial(
            finalize_model_grads, pg_collection=model.groups.collection
        )
        self.policy = Policy(
            model, self.chunks, temperature=temperature, routers=self.routers, deterministic=deterministic
        )

    def start_phase(
        self, *, total_steps: int, lr: float, warmup_steps: int, decay: Decay | None = None
    ) -> None:
        """Begin a phase: fresh moments, masters read from the model's weights, a new schedule.

        ``decay`` is ``actor.optimizer.decay`` where it is None.
        """
        settings, config = self.settings, self.model.transformer_config
        self.optimizer: Any = get_megatron_optimizer(
            optimizer_config(settings, config, lr=lr),
            self.chunks,
            use_gloo_process_groups=False,
            pg_collection=self.model.groups.collection,
        )
        self.model.fp8_parameters.optimizer = self.optimizer
        config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=min(settings.min_lr, lr),
            lr_warmup_steps=warmup_steps,
            # Megatron divides by what the warm-up leaves of these.
            lr_decay_steps=max(total_steps, warmup_steps + 1),
            lr_decay_style=decay or settings.decay,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
        )
        if warmup_steps > 0:
            self.scheduler.step(1)  # the first step trains too: at 1/warmup_steps of the rate, not at 0

    def go_on_at(self, num_steps: int) -> None:
        """Set the learning rate's schedule to where it stands after ``num_steps`` of its steps."""
        self.scheduler.num_steps = num_steps
        self.scheduler.step(0)

    def step(self, microbatches: Sequence[Microbatch], loss: Loss) -> StepResult:
        """Forward, backward, clip, update.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; the weights are as before.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = float(self.optimizer.param_groups[0]["lr"])
        biases = self.routers.biases()  # Megatron updates them with the gradients
        parts = self.policy.run(microbatches, loss, forward_only=False)
        totals = self._join(parts, loss.names)
        loss_sum, num_tokens = totals.pop("loss_sum"), totals.pop("num_tokens")
        grad_sum = totals.pop("grad_sum")
        if not (math.isfinite(loss_sum) and math.isfinite(grad_sum)):
            self.routers.restore(biases)
            what = "loss" if not math.isfinite(loss_sum) else "gradient"
            raise NonFiniteError(
                f"the {what} is not finite (loss sum {loss_sum}, gradient sum {grad_sum}); the weights were "
                "not updated. Lower actor.optimizer.lr, or look for bad samples in this step's batch."
            )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return StepResult(
            loss=loss_sum / max(num_tokens, 1),
            grad_norm=float(grad_norm or 0.0),
            lr=lr,
            num_tokens=int(num_tokens),
            sums=totals,
            router=self.routers.report() if self.routers.losses != RouterLosses() else None,
        )

    def _join(self, parts: Sequence[Sums], names: Sequence[str]) -> dict[str, float]:
        """Join sums (and maxima) over microbatches and ranks, each microbatch once.

        ``grad_sum``, the sum of all gradients, is only a probe: a NaN or infinity anywhere in a buffer
        is one in its sum.
        """
        at = self.model.groups.coordinates
        if not (self.policy.is_last_stage and at.tp == 0):
            parts = []
        maxima = [name for name in names if name.endswith("_max")]
        sums = ["loss_sum", "num_tokens", *(name for name in names if name not in maxima)]
        buffers = [
            buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        grad_sum = sum(float(buffer.grad_data.sum()) for buffer in buffers)
        summed = _reduced(
            [*(sum(float(part[name]) for part in parts) for name in sums), grad_sum], dist.ReduceOp.SUM
        )
        joined = dict(zip([*sums, "grad_sum"], summed, strict=True))
        if maxima:
            highest = [max((float(part[name]) for part in parts), default=-math.inf) for name in maxima]
            joined.update(zip(maxima, _reduced(highest, dist.ReduceOp.MAX), strict=True))
        return joined

    def held(self, part: Part) -> list[Tensor]:
        """What this rank keeps on its device of a part that can be offloaded."""
        weights = list(self.model.tensors().values())
        if part == "weights":
            return weights
        if part == "gradients":
            buffers = [each for c in self.chunks for each in (*c.buffers, *c.expert_parallel_buffers)]
            return [each.grad_data for each in buffers]
        # None before the first phase; in fp32 Adam updates the weights themselves.
        parts = parts_of(self.optimizer) if hasattr(self, "optimizer") else ()
        adams = [adam for each in parts for adam in adams_of(each)]
        found = [tensor for adam in adams for group in adam.param_groups for tensor in group["params"]]
        states = [state for adam in adams for state in adam.state.values()]
        found += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        own = {tensor.untyped_storage()._cdata for tensor in weights}
        kind = current_device().torch_device.type  # counts of steps are on the host, and what steps there
        return [t for t in found if t.device.type == kind and t.untyped_storage()._cdata not in own]

    def host_copies(self) -> dict[Part, HostCopy]:
        """The parts that can be offloaded while the engine samples."""
        return {
            "weights": HostCopy(partial(self.held, "weights")),
            "gradients": HostCopy(partial(self.held, "gradients"), keeps=False),
            "optimizer": HostCopy(partial(self.held, "optimizer")),
        }

    @contextmanager
    def weights_swapped(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Run with other weights (from ``copy_weights``) in place of the policy's, then put them back."""
        own = self.copy_weights()
        self._write(weights)
        try:
            yield
        finally:
            self._write(own)

    def copy_weights(self) -> list[Tensor]:
        """Copies of this rank's parameters, in order, on the CPU."""
        return [parameter.detach().cpu().clone() for parameter in self.model.tensors().values()]

    def _write(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.tensors().values(), weights, strict=True):
                parameter.copy_(value)


def _routers(model: Model, section: RouterSection) -> Routers:
    losses = RouterLosses(
        aux_loss=section.aux_loss,
        aux_loss_coeff=section.aux_loss_coeff,
        z_loss_coeff=section.z_loss_coeff,
    )
    model.transformer_config.moe_router_bias_update_rate = section.bias_update_rate
    routers = Routers(model.chunks, losses, updates_bias=section.bias_update_rate > 0)
    if section.freeze:
        routers.freeze()
    return routers


def _reduced(values: Sequence[float], op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=current_device().torch_device)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()
