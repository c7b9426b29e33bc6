"""Completions and rewards between ranks, as plain tensors.

Each engine returns its own share of completions; every rank needs all of them to compute advantages and
to agree on the division into microbatches without further talk.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.batch import Completion, FinishReason
from mtrl.parallel.agreement import all_gather_ragged
from mtrl.parallel.device import current_device

_REASONS: tuple[FinishReason, ...] = ("stop", "length")
_HEADER = 6  # prompt_id, sample_index, policy_version, reason, num tokens, num text bytes


def all_gather_completions(own: Sequence[Completion]) -> list[Completion]:
    """All ranks' completions, ordered by prompt id, then sample index. Collective over WORLD."""
    integers, logprobs = encode(own)
    all_integers, all_logprobs = all_gather_ragged(integers), all_gather_ragged(logprobs)
    found = [
        completion
        for integers_here, logprobs_here in zip(all_integers, all_logprobs, strict=True)
        for completion in decode(integers_here.tolist(), logprobs_here.tolist())
    ]
    return sorted(found, key=lambda each: (each.prompt_id, each.sample_index))


def encode(completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Completions as int64 (headers, tokens, UTF-8 texts) and float32 (log-probabilities), both 1-d."""
    integers: list[int] = []
    logprobs: list[float] = []
    for each in completions:
        text = each.text.encode()
        header = (each.prompt_id, each.sample_index, each.policy_version, _REASONS.index(each.finish_reason))
        integers.extend((*header, len(each.tokens), len(text), *each.tokens, *text))
        logprobs.extend(each.logprobs)
    return torch.tensor(integers, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float32)


def decode(integers: Sequence[int], logprobs: Sequence[float]) -> list[Completion]:
    """The completions that `encode` was given."""
    found: list[Completion] = []
    at = taken = 0
    while at < len(integers):
        prompt_id, sample_index, version, reason, num_tokens, num_bytes = integers[at : at + _HEADER]
        text_start = at + _HEADER + num_tokens
        found.append(
            Completion(
                prompt_id=prompt_id,
                sample_index=sample_index,
                tokens=tuple(integers[at + _HEADER : text_start]),
                logprobs=tuple(logprobs[taken : taken + num_tokens]),
                finish_reason=_REASONS[reason],
                policy_version=version,
                text=bytes(integers[text_start : text_start + num_bytes]).decode(),
            )
        )
        at, taken = text_start + num_bytes, taken + num_tokens
    return found


def broadcast_floats(values: Sequence[float], length: int) -> list[float]:
    """Rank 0's values on every rank; other ranks pass anything. Collective over WORLD."""
    device = current_device().torch_device
    tensor = torch.zeros(length, dtype=torch.float64, device=device)
    if dist.get_rank() == 0:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.broadcast(tensor, src=0)
    return tensor.tolist()


def max_over_ranks(value: float) -> float:
    """The largest of all ranks' values. Collective over WORLD."""
    tensor = torch.tensor([value], dtype=torch.float64, device=current_device().torch_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def sum_over_ranks(value: float) -> float:
    """The sum of all ranks' values. Collective over WORLD."""
    tensor = torch.tensor([value], dtype=torch.float64, device=current_device().torch_device)
    dist.all_reduce(tensor)
    return float(tensor)
