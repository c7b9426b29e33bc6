"""Samples to microbatches: which sample goes where (`plan_microbatches`), and the tensors (`pack`). Pure.

A packed microbatch is one row of T tokens. Samples lie in it one after another, each a segment that
attends only to itself; what is left up to T is padding, one last segment of its own, so that padding never
attends to a sample nor a sample to it. Position t of every per-token tensor is about predicting
``targets_T[t]``, the token after ``tokens_T[t]`` in the same sample.

Under context parallelism a rank keeps only its tokens of the row (`take`); everything that is said per token
stays true.
Suffixes: T is the tokens of a row, padding included.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mtrl.batch import Sample
from mtrl.parallel.errors import ConfigError

Plan = tuple[tuple[tuple[int, ...], ...], ...]


def default_cost(length: int) -> float:
    """Relative time of a sample: linear layers by tokens, attention by their square.

    Equal at 16,384 tokens, about where they meet in Qwen3-30B-A3B: forward FLOPs a token and layer are
    2 x 3.0e9 active parameters / 48 layers, against 2 x 4096 s in causal attention over s tokens.
    Dense models meet later.
    """
    return length + length * length / 16384


def plan_microbatches(
    lengths: Sequence[int],
    *,
    num_dp: int,
    max_tokens: int,
    multiple_of: int = 1,
    cost: Callable[[int], float] = default_cost,
) -> Plan:
    """Return ``plan[dp][microbatch]``, tuples of indices into ``lengths``, each index exactly once.

    Every dp rank has the same number of microbatches, a multiple of ``multiple_of``, as Megatron's schedules
    need; none holds more than ``max_tokens`` tokens. The number is the smallest at which taking the samples
    by falling cost, each into the cheapest microbatch with room, fits. Microbatches of one index, which the
    ranks run at the same time, are of similar cost. With few samples a microbatch may be empty: `pack` makes
    a row of padding of it. The same arguments give the same plan. Raises `ConfigError` for a sample that is
    too long.

    >>> plan_microbatches([5, 3, 4, 2], num_dp=2, max_tokens=8)
    (((0, 3),), ((2, 1),))
    """
    assert num_dp >= 1 and multiple_of >= 1, "there is at least one rank and one microbatch"
    for index, length in enumerate(lengths):
        assert length >= 1, f"sample {index} is empty"
        if length > max_tokens:
            raise ConfigError(
                f"sample {index} of the batch has {length} tokens, and a microbatch holds "
                f"at most {max_tokens}; raise the tokens per microbatch to {length} or "
                f"more, or shorten prompts and completions"
            )
    step = num_dp * multiple_of
    num_bins = step * max(1, -(-sum(lengths) // (max_tokens * step)))
    costs = [cost(length) for length in lengths]
    while (bins := _fill(lengths, costs, num_bins, max_tokens)) is None:
        num_bins += step
    return _deal(bins, costs, num_dp)


def _fill(
    lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[tuple[int, ...]] | None:
    """Longest processing time first, with a bound on tokens; None if a sample finds no room."""
    members: list[list[int]] = [[] for _ in range(num_bins)]
    room = [max_tokens] * num_bins
    # The second key makes an empty bin come before one that holds samples of no cost.
    heap = [(0.0, 0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda index: (-costs[index], -lengths[index], index)):
        too_full = []
        while heap and room[heap[0][2]] < lengths[index]:
            too_full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, count, number = heapq.heappop(heap)
        members[number].append(index)
        room[number] -= lengths[index]
        heapq.heappush(heap, (load + costs[index], count + 1, number))
        for entry in too_full:
            heapq.heappush(heap, entry)
    return [tuple(member) for member in members]


def _deal(bins: list[tuple[int, ...]], costs: Sequence[float], num_dp: int) -> Plan:
    """Deal bins by falling cost, there and back: alike within each round, and alike in sum for each rank."""
    order = sorted(bins, key=lambda members: -sum(costs[index] for index in members))
    hands: list[list[tuple[int, ...]]] = [[] for _ in range(num_dp)]
    for start in range(0, len(order), num_dp):
        round_ = order[start : start + num_dp]
        there = (start // num_dp) % 2 == 0
        for rank, members in enumerate(round_ if there else reversed(round_)):
            hands[rank].append(members)
    return tuple(tuple(hand) for hand in hands)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMicrobatch:
    """One row of packed samples as tensors; see the top of the file for how they lie."""

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64; from 0 in each sample; all 0 in the padding, which may be longer than the model's context."""
    targets_T: Tensor
    """int64; ``pad_token_id`` after the last token of a sample and in the padding; not trained there."""
    loss_mask_T: Tensor
    """bool; whether the prediction of ``targets_T[t]`` is trained."""
    sampler_logprobs_T: Tensor
    """float32, of ``targets_T[t]``; 0.0 where the mask is False."""
    advantages_T: Tensor
    """float32; 0.0 where the mask is False."""
    cu_seqlens: Tensor
    """int32 [segments + 1]; where each segment begins, then T. Padding, if any, is the last segment."""
    max_seqlen: int
    """Tokens of the longest segment, padding included."""
    sample_ids: tuple[int, ...]
    """``sample_id`` of each sample in the order they lie in; the padding segment has none."""

    @property
    def num_loss_tokens(self) -> int:
        """How many predictions are trained; waits for the device the mask is on."""
        return int(self.loss_mask_T.sum())

    def to(self, device: torch.device) -> "PackedMicrobatch":
        """Return a copy with every tensor on ``device``."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device),
            positions_T=self.positions_T.to(device),
            targets_T=self.targets_T.to(device),
            loss_mask_T=self.loss_mask_T.to(device),
            sampler_logprobs_T=self.sampler_logprobs_T.to(device),
            advantages_T=self.advantages_T.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
        )


def pack(samples: Sequence[Sample], *, pad_to: int, pad_token_id: int) -> PackedMicrobatch:
    """Lay samples into a row of ``pad_to`` tokens; no samples give a row of padding, which trains nothing."""
    lengths = [len(sample.tokens) for sample in samples]
    num_padding = pad_to - sum(lengths)
    assert pad_to >= 1 and num_padding >= 0, f"{sum(lengths)} tokens do not fit a row of {pad_to}"
    segments = [*lengths, num_padding] if num_padding else lengths
    mask = [flag for sample in samples for flag in (*sample.loss_mask[1:], False)]
    logprobs = [value for sample in samples for value in _next_logprobs(sample)]
    advantages = [sample.advantage for sample in samples for _ in sample.tokens]
    targets = [token for sample in samples for token in (*sample.tokens[1:], pad_token_id)]

    def row(values: Iterable[float], filler: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *[filler] * num_padding], dtype=dtype)

    loss_mask_T = row(mask, False, torch.bool)
    return PackedMicrobatch(
        tokens_T=row((token for sample in samples for token in sample.tokens), pad_token_id, torch.int64),
        positions_T=row((place for length in lengths for place in range(length)), 0, torch.int64),
        targets_T=row(targets, pad_token_id, torch.int64),
        loss_mask_T=loss_mask_T,
        sampler_logprobs_T=row(logprobs, 0.0, torch.float32).masked_fill_(~loss_mask_T, 0.0),
        advantages_T=row(advantages, 0.0, torch.float32).masked_fill_(~loss_mask_T, 0.0),
        cu_seqlens=torch.tensor([0, *accumulate(segments)], dtype=torch.int32),
        max_seqlen=max(segments),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def take(packed: PackedMicrobatch, index: Tensor) -> PackedMicrobatch:
    """The row with the tokens at ``index`` only, in that order; ``cu_seqlens`` stays the whole row's."""
    return replace(
        packed,
        tokens_T=packed.tokens_T[index],
        positions_T=packed.positions_T[index],
        targets_T=packed.targets_T[index],
        loss_mask_T=packed.loss_mask_T[index],
        sampler_logprobs_T=packed.sampler_logprobs_T[index],
        advantages_T=packed.advantages_T[index],
    )


def _next_logprobs(sample: Sample) -> tuple[float, ...]:
    return (*sample.sampler_logprobs[1:], 0.0) if sample.sampler_logprobs else (0.0,) * len(sample.tokens)


def unpack(packed: PackedMicrobatch, values_T: Tensor) -> tuple[tuple[float, ...], ...]:
    """Cut a per-token tensor of the row into one tuple a sample, as `pack` laid ``tokens_T``."""
    assert values_T.shape == packed.tokens_T.shape, "one value per token of the row"
    bounds, values = packed.cu_seqlens.tolist(), values_T.tolist()
    return tuple(tuple(values[bounds[i] : bounds[i + 1]]) for i in range(len(packed.sample_ids)))


def unpack_predictions(packed: PackedMicrobatch, values_T: Tensor) -> tuple[tuple[float, ...], ...]:
    """Cut a tensor about ``targets_T``, log-probabilities say, into tuples aligned with each sample's tokens.

    Value t of a tuple is about the sample's token t, as in ``Sample.sampler_logprobs``; the first, which
    nothing predicts, is 0.0.
    """
    return tuple((0.0, *values[:-1]) for values in unpack(packed, values_T))
