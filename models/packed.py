"""How packed sequences reach attention: their boundaries, positions and a plan to attend by.

Legend: T tokens of a microbatch, S segments, L padded length of a bucket, H heads, D head dim.
"""

from dataclasses import dataclass

import torch

import mtrl.parallel.megatron_ready  # noqa: F401

from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBucket:
    """Segments of similar length, attended together as one padded batch.

    ``gather_SL`` (int64) is the token of each position of the padded batch; positions past a
    segment's end repeat its last token, which is causal-safe: no real token attends to them.
    """

    gather_SL: torch.Tensor


@dataclass
class PackedSegments(PackedSeqParams):  # type: ignore[misc]
    """Megatron's packed-sequence argument, with what ``torch_native`` needs besides.

    Megatron's own fields describe one sequence of all T tokens: the boundaries matter to attention
    and to rotary positions only, and both take them from here. ``positions_T`` restarts at 0 in each
    segment. ``scatter_T`` says, for each token, its row among all buckets' rows laid end to end.
    """

    positions_T: torch.Tensor | None = None
    buckets: tuple[SegmentBucket, ...] = ()
    scatter_T: torch.Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device) -> "PackedSegments":
        """Segments of these lengths, in order; their sum is T."""
        total = sum(lengths)
        starts, position = [], 0
        for length in lengths:
            starts.append(position)
            position += length
        lengths_S = torch.tensor(lengths, dtype=torch.int64)
        starts_S = torch.tensor(starts, dtype=torch.int64)
        positions = torch.arange(total) - torch.repeat_interleave(starts_S, lengths_S)
        buckets, scatter = _bucket(lengths_S, starts_S, total)
        cu_seqlens = torch.tensor([0, total], dtype=torch.int32, device=device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=total,
            max_seqlen_kv=total,
            positions_T=positions.to(device),
            buckets=tuple(SegmentBucket(gather_SL=gather.to(device)) for gather in buckets),
            scatter_T=scatter.to(device),
        )


def _bucket(
    lengths_S: torch.Tensor, starts_S: torch.Tensor, total: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Group segments whose lengths have the same power of two above them; pad each to its longest."""
    ceilings_S = torch.ceil(torch.log2(lengths_S.double())).long()
    gathers: list[torch.Tensor] = []
    scatter_T = torch.empty(total, dtype=torch.int64)
    row = 0
    for ceiling in ceilings_S.unique().tolist():
        members = (ceilings_S == ceiling).nonzero().squeeze(1)
        longest = int(lengths_S[members].max())
        offsets_SL = torch.arange(longest).expand(len(members), longest)
        last_S1 = (lengths_S[members] - 1).unsqueeze(1)
        gather_SL = starts_S[members].unsqueeze(1) + torch.minimum(offsets_SL, last_S1)
        is_real_SL = offsets_SL <= last_S1
        rows_SL = row + torch.arange(gather_SL.numel()).view_as(gather_SL)
        scatter_T[gather_SL[is_real_SL]] = rows_SL[is_real_SL]
        gathers.append(gather_SL)
        row += gather_SL.numel()
    return gathers, scatter_T
