"""The policy's forward pass over packed tokens, and the closures Megatron's schedules run.

Legend: T this rank's tokens of a microbatch, V this rank's share of the vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mtrl.batch import Sample
from mtrl.logprobs import target_logprobs
from mtrl.models.builder import Model
from mtrl.models.packed import PackedSegments, zigzag_tokens
from mtrl.models.router import Routers
from mtrl.packing import PackedMicrobatch, pack, plan_microbatches, take
from mtrl.parallel.determinism import deterministic_algorithms
from mtrl.parallel.device import current_device

from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.pipeline_parallel import get_forward_backward_func

_ROW_MULTIPLE = 8  # so that rows of many lengths share kernels and allocations
# Transformer Engine: fill_userbuffers_buffer_for_all_gather in pytorch/module/base.py.
_MXFP8_IN_USER_BUFFERS = 128

Sums = dict[str, Tensor]
"""0-d tensors of one microbatch; those named ``*_max`` join by maximum, the others by sum."""


class Loss(Protocol):
    """What is minimised: the sum over trained tokens, which the trainer divides by their global count.

    ``names`` are the sums it reports besides, known without a microbatch because only the last
    pipeline stage sees one.
    """

    names: ClassVar[tuple[str, ...]]

    def __call__(self, logprobs_T: Tensor, microbatch: "Microbatch") -> tuple[Tensor, Sums]:
        """Return the loss summed over trained tokens, and the sums that ``names`` lists."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """A packed microbatch on the device, with what was computed for it before the update.

    ``sample_T`` (int64) says which of the row's samples a token belongs to, -1 for padding.
    ``old_logprobs_T`` and ``ref_logprobs_T`` are float32 about ``packed.targets_T``; None when not needed.
    """

    packed: PackedMicrobatch
    segments: PackedSegments
    sample_T: Tensor
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None

    @classmethod
    def on_device(cls, packed: PackedMicrobatch, *, cp: int = 1, cp_rank: int = 0) -> "Microbatch":
        """Move a packed microbatch to this process's device and plan its attention.

        Of the row it keeps what this context parallel rank has of it.
        """
        device = current_device().torch_device
        segments = PackedSegments.from_lengths(_lengths(packed), device, cp=cp, cp_rank=cp_rank)
        sample_T = _samples_of_tokens(packed)
        if cp > 1:
            own = zigzag_tokens(packed.tokens_T.numel(), cp, cp_rank)
            packed, sample_T = take(packed, own), sample_T[own]
        return cls(packed=packed.to(device), segments=segments, sample_T=sample_T.to(device))


def make_microbatches(
    samples: Sequence[Sample], model: Model, *, max_tokens: int, pad_token_id: int
) -> list[Microbatch]:
    """This rank's microbatches of a global batch that every rank passes whole.

    All ranks get equally many, padded to one length: Megatron's pipeline sends tensors of one shape, sequence
    parallelism wants a length that ``attn.tp`` divides, and context parallelism two chunks a rank. With
    ``actor.tp_comm_overlap`` it is that of ``max_tokens`` in every batch: user buffers are of one shape.
    """
    spec, at = model.groups.layout.spec, model.groups.coordinates
    cp = spec.attn.cp
    lengths = [len(sample.tokens) for sample in samples]
    plan = plan_microbatches(
        lengths,
        num_dp=spec.attn.dp,
        max_tokens=max_tokens,
        # Megatron's interleaved schedule wants as many microbatches as stages, or a multiple.
        multiple_of=spec.attn.pp if len(model.chunks) > 1 else 1,
    )
    longest = max(sum(lengths[index] for index in row) for rank in plan for row in rank)
    pad_to = row_length(model, max_tokens if model.transformer_config.tp_comm_overlap else longest)
    return [
        Microbatch.on_device(
            pack([samples[i] for i in row], pad_to=pad_to, pad_token_id=pad_token_id), cp=cp, cp_rank=at.cp
        )
        for row in plan[at.dp]
    ]


def row_length(model: Model, num_tokens: int) -> int:
    """The shortest row that holds ``num_tokens`` and that the layout's axes and FP8 can share."""
    attn = model.groups.layout.spec.attn
    shares = attn.tp * (2 * attn.cp if attn.cp > 1 else 1)
    multiple = math.lcm(_ROW_MULTIPLE, shares * _fp8_alignment(model))
    return -(-max(num_tokens, 1) // multiple) * multiple


def _fp8_alignment(model: Model) -> int:
    """Megatron's FP8 products want a rank's share of a row to be a multiple of this; 1 without them."""
    config = model.transformer_config
    if config.fp8_recipe == "mxfp8" and config.tp_comm_overlap:
        return _MXFP8_IN_USER_BUFFERS
    return int(get_fp8_align_size(config.fp8_recipe)) if config.fp8 else 1


def _lengths(packed: PackedMicrobatch) -> list[int]:
    """Segment lengths, with the padding cut so that attending to it costs no more than to a sample."""
    lengths = (packed.cu_seqlens[1:] - packed.cu_seqlens[:-1]).tolist()
    num_samples = len(packed.sample_ids)
    longest = max(lengths[:num_samples], default=1)
    for padding in lengths[num_samples:]:
        whole, rest = divmod(padding, longest)
        lengths[num_samples:] = [longest] * whole + ([rest] if rest else [])
    return lengths


def _samples_of_tokens(packed: PackedMicrobatch) -> Tensor:
    samples = torch.arange(packed.cu_seqlens.numel() - 1)
    sample_T = torch.repeat_interleave(samples, packed.cu_seqlens.cpu().diff().long())
    return sample_T.masked_fill(sample_T >= len(packed.sample_ids), -1)


class Policy:
    """Runs Megatron's pipeline schedule over microbatches, forward alone or with backward.

    ``chunks`` are what the schedule calls: the model's, or Megatron's DDP around them. ``routers`` add their
    losses to passes with backward; ``deterministic`` has torch choose kernels that repeat bit for bit.
    """

    def __init__(
        self,
        model: Model,
        chunks: Sequence[nn.Module],
        *,
        temperature: float = 1.0,
        routers: Routers | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model, self.chunks, self.temperature = model, list(chunks), temperature
        self.routers = routers or Routers(model.chunks)
        self._deterministic = deterministic
        self._membership: Tensor | None = None
        decoders: list[Any] = [chunk.decoder for chunk in model.chunks]
        for decoder in decoders:
            # GPTModel's own padding mask is a row's only, and is not split on later pipeline stages.
            decoder.register_forward_pre_hook(self._tell_routers, with_kwargs=True)
        spec, at = model.groups.layout.spec, model.groups.coordinates
        self.is_last_stage = at.pp == spec.attn.pp - 1
        share = -(-model.config.vocab_size // spec.attn.tp)
        self._padding = min(share, max(0, (at.tp + 1) * share - model.config.vocab_size))
        self._run_schedule = get_forward_backward_func(
            pp_size=spec.attn.pp, vp_size=len(chunks) if len(chunks) > 1 else None
        )

    def logprobs(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Log-probabilities of every target of every microbatch, float32 [T] each, without gradient.

        Every rank of a pipeline gets them. Collective over the rank's model-parallel group.
        """
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            parts = self.run(microbatches, _KeepLogprobs(), forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        shape = (len(microbatches), microbatches[0].packed.tokens_T.numel())
        result = torch.zeros(shape, device=current_device().torch_device)
        if self.is_last_stage:
            result = torch.stack([part["logprobs"] for part in parts])
        pp = self.model.groups.attn.pp
        if pp.size() > 1:
            torch.distributed.broadcast(result, group=pp, group_src=pp.size() - 1)
        return list(result)

    def run(self, microbatches: Sequence[Microbatch], loss: Loss, *, forward_only: bool) -> list[Sums]:
        """One pass of the schedule; the sums of each microbatch on the last stage, [] elsewhere.

        With backward, gradients are left in DDP's buffers, reduced and divided by the global count of
        trained tokens. All microbatches of a step, on all ranks, are padded to the same T.
        """
        if forward_only or not self.routers.are_watched:
            return self._run(microbatches, loss, forward_only=forward_only)
        if self.routers.losses.aux_loss == "global_batch":
            with torch.no_grad(), self.routers.counting():
                self._run(microbatches, _KeepLogprobs(), forward_only=True)
        num_tokens, num_trained = self._count_tokens(microbatches)
        with self.routers.training(num_tokens=num_tokens, num_trained=num_trained):
            return self._run(microbatches, loss, forward_only=False)

    def _count_tokens(self, microbatches: Sequence[Microbatch]) -> tuple[float, float]:
        """Real and trained tokens of the step. Collective over dp x cp."""
        real = sum(int((each.sample_T >= 0).sum()) for each in microbatches)
        trained = sum(each.packed.num_loss_tokens for each in microbatches)
        counts = torch.tensor([real, trained], dtype=torch.float64, device=current_device().torch_device)
        torch.distributed.all_reduce(counts, group=self.model.groups.attn.dp_cp)
        return float(counts[0]), float(counts[1])

    def _run(self, microbatches: Sequence[Microbatch], loss: Loss, *, forward_only: bool) -> list[Sums]:
        # Megatron wants the whole row's length, and divides it by cp itself.
        seq_length = microbatches[0].packed.tokens_T.numel() * self.model.groups.layout.spec.attn.cp
        iterators = [iter(microbatches) for _ in self.chunks]
        with deterministic_algorithms(self._deterministic):
            result: list[Sums] = self._run_schedule(
                forward_step_func=self._forward_step(loss),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(microbatches),
                seq_length=seq_length,
                micro_batch_size=1,
                decoder_seq_length=seq_length,
                forward_only=forward_only,
            )
        return result

    def _forward_step(self, loss: Loss) -> Callable[..., Any]:
        def forward_step(
            iterator: Iterator[Microbatch], chunk: nn.Module, return_schedule_plan: bool = False
        ) -> tuple[Any, Any]:
            microbatch = next(iterator)
            packed = microbatch.packed
            self._membership = self._member_tokens(microbatch)
            row = (packed.tokens_T.unsqueeze(0), packed.positions_T.unsqueeze(0), None)
            if return_schedule_plan:
                # Megatron overlaps the communication of one microbatch with another's computation.
                output = chunk.build_schedule_plan(  # type: ignore[operator]
                    *row, packed_seq_params=microbatch.segments, padding_mask=self._membership
                )
            else:
                output = chunk(*row, packed_seq_params=microbatch.segments)

            def sum_loss(logits_1TV: Tensor) -> tuple[Tensor, Tensor, Sums]:
                logprobs_T = target_logprobs(
                    logits_1TV.squeeze(0),
                    packed.targets_T,
                    padding=self._padding,
                    temperature=self.temperature,
                    group=self.model.groups.attn.tp,
                )
                loss_sum, sums = loss(logprobs_T, microbatch)
                num_tokens = packed.loss_mask_T.sum()
                totals = {"loss_sum": loss_sum.detach().clone(), "num_tokens": num_tokens}
                return loss_sum, num_tokens.to(torch.int), {**sums, **totals}

            return output, sum_loss

        return forward_step

    def _member_tokens(self, microbatch: Microbatch) -> Tensor | None:
        """`Routers.membership` of the tokens that this rank's MoE layers see: its part of the sequence."""
        spec, at = self.model.groups.layout.spec, self.model.groups.coordinates
        sample_T = microbatch.sample_T
        if self.model.transformer_config.sequence_parallel:
            sample_T = sample_T.chunk(spec.attn.tp)[at.tp]
        return self.routers.membership(sample_T, len(microbatch.packed.sample_ids))

    def _tell_routers(
        self, decoder: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # As an argument, it reaches layers that are recomputed after the next microbatch has begun.
        return arguments, {**named, "padding_mask": self._membership}


class _KeepLogprobs:
    """Not a loss: hands the log-probabilities out of the schedule."""

    names: ClassVar[tuple[str, ...]] = ("logprobs",)

    def __call__(self, logprobs_T: Tensor, microbatch: Microbatch) -> tuple[Tensor, Sums]:
        return logprobs_T.new_zeros(()), {"logprobs": logprobs_T}
