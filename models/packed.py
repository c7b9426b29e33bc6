"""How packed sequences reach attention: their boundaries, positions and a plan to attend by.

Legend: T tokens of a microbatch's row, S segments, L padded queries and K padded keys of a segment.

Context parallel ranks share a row in zigzag: it is cut into 2 * cp equal chunks, and rank r has chunks r and
2 * cp - 1 - r, so that late tokens, which attend to more, are dealt evenly (Llama 3, arXiv 2407.21783,
section 3.3.2). Chunks cut through segments where they fall; positions and masks say what belongs together.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

import mtrl.parallel.megatron_ready  # noqa: F401

from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBucket:
    """Segments of similar length, attended together as one padded batch.

    ``query_SL`` and ``key_SK`` (int64) are rows of this rank's queries and of all ranks' keys, laid end to
    end by rank. ``query_offsets_SL`` is each query's position in its segment; key k of a segment has position
    k. Past a segment's end its last token is repeated, at a position that no real token attends to.
    ``is_whole``: the queries are the keys' tokens, so that causal order needs no mask.
    """

    query_SL: torch.Tensor
    query_offsets_SL: torch.Tensor
    key_SK: torch.Tensor
    is_whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """The runs of this rank's queries that lie in one segment and one chunk, and the keys that each sees.

    A run's queries are the last of its keys: the segment's, up to the run's end. ``query_bounds`` and
    ``key_bounds`` (int32, from 0) are where runs lie, end to end; ``key_rows`` (int64) says which of all
    ranks' rows, laid end to end by rank, stands at each place of ``key_bounds``. Without context parallelism
    runs are the segments, and keys are the queries' tokens in order.
    """

    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    key_rows: torch.Tensor
    longest_query: int
    longest_key: int


@dataclass
class PackedSegments(PackedSeqParams):  # type: ignore[misc]
    """Megatron's packed-sequence argument, with what the backends need besides.

    Megatron's own fields describe one sequence of all T tokens, of which it gives context parallel ranks the
    zigzag chunks described above: the boundaries matter to attention and to rotary positions only, and both
    take them from here. ``positions_T`` is of the whole row and restarts at 0 in each segment. ``scatter_T``
    says, for each of this rank's tokens, its row among all buckets' rows laid end to end. ``is_dense``: the
    one bucket's rows are the tokens in order, so that nothing needs to be gathered or scattered.
    ``lengths`` are the segments', ``cp`` and ``own_cp`` the context parallel size and rank.
    """

    positions_T: torch.Tensor | None = None
    buckets: tuple[SegmentBucket, ...] = ()
    scatter_T: torch.Tensor | None = None
    is_dense: bool = False
    lengths: tuple[int, ...] = ()
    cp: int = 1
    own_cp: int = 0

    @cached_property
    def spans(self) -> Spans:
        """What an attention of sequences of unequal lengths takes (``transformer_engine``)."""
        assert self.scatter_T is not None, "packed sequences come as PackedSegments"
        return _spans(list(self.lengths), self.cp, self.own_cp, self.scatter_T.device)

    @classmethod
    def from_lengths(
        cls, lengths: list[int], device: torch.device, *, cp: int = 1, cp_rank: int = 0
    ) -> "PackedSegments":
        """Segments of these lengths, in order; their sum is T, which ``2 * cp`` divides where cp > 1."""
        total = sum(lengths)
        lengths_S = torch.tensor(lengths, dtype=torch.int64)
        starts_S = lengths_S.cumsum(0) - lengths_S
        positions = torch.arange(total) - torch.repeat_interleave(starts_S, lengths_S)
        buckets, scatter = _bucket(lengths_S, starts_S, total, cp, cp_rank)
        cu_seqlens = torch.tensor([0, total], dtype=torch.int32, device=device)
        is_dense = cp == 1 and len(set(lengths)) == 1
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=total,
            max_seqlen_kv=total,
            positions_T=positions.to(device),
            buckets=tuple(_on_device(bucket, device) for bucket in buckets),
            scatter_T=scatter.to(device),
            is_dense=is_dense,
            lengths=tuple(lengths),
            cp=cp,
            own_cp=cp_rank,
        )


def zigzag_tokens(total: int, cp: int, cp_rank: int) -> torch.Tensor:
    """Which tokens of a row a context parallel rank has, in the order it has them; int64 [total / cp].

    >>> zigzag_tokens(8, cp=2, cp_rank=0).tolist()
    [0, 1, 6, 7]
    """
    if cp == 1:
        return torch.arange(total)
    assert total % (2 * cp) == 0, f"a row of {total} tokens has no {2 * cp} equal chunks"
    chunks = torch.arange(total).view(2 * cp, -1)
    return torch.cat((chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]))


def _gathered_rows(total: int, cp: int) -> torch.Tensor:
    """Each token's row among all ranks' rows laid end to end by rank; int64 [total]."""
    rows_T = torch.empty(total, dtype=torch.int64)
    rows_T[torch.cat([zigzag_tokens(total, cp, rank) for rank in range(cp)])] = torch.arange(total)
    return rows_T


def _spans(lengths: list[int], cp: int, cp_rank: int, device: torch.device) -> Spans:
    ends = list(accumulate(lengths))
    chunk = ends[-1] // (2 * cp)
    owned = [(n * chunk, (n + 1) * chunk) for n in (cp_rank, 2 * cp - 1 - cp_rank)]
    queries, keys = [], []
    for low, high in owned if cp > 1 else [(0, ends[-1])]:
        for end, length in zip(ends, lengths, strict=True):
            first, stop = max(low, end - length), min(high, end)
            if first < stop:
                queries.append(stop - first)
                keys.append((end - length, stop))
    key_lengths = [stop - start for start, stop in keys]
    rows_T = _gathered_rows(ends[-1], cp)
    bounds = [torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in (queries, key_lengths)]
    return Spans(
        query_bounds=bounds[0].to(device),
        key_bounds=bounds[1].to(device),
        key_rows=torch.cat([rows_T[start:stop] for start, stop in keys]).to(device),
        longest_query=max(queries),
        longest_key=max(key_lengths),
    )


def _on_device(bucket: SegmentBucket, device: torch.device) -> SegmentBucket:
    return SegmentBucket(
        query_SL=bucket.query_SL.to(device),
        query_offsets_SL=bucket.query_offsets_SL.to(device),
        key_SK=bucket.key_SK.to(device),
        is_whole=bucket.is_whole,
    )


def _bucket(
    lengths_S: torch.Tensor, starts_S: torch.Tensor, total: int, cp: int, cp_rank: int
) -> tuple[list[SegmentBucket], torch.Tensor]:
    """Group segments whose lengths have the same power of two above them; pad each to its longest."""
    own_tokens = zigzag_tokens(total, cp, cp_rank)
    is_own_T = torch.zeros(total, dtype=torch.bool)
    is_own_T[own_tokens] = True
    own_row_T = torch.empty(total, dtype=torch.int64)
    own_row_T[own_tokens] = torch.arange(len(own_tokens))
    gathered_row_T = _gathered_rows(total, cp)

    ceilings_S = torch.ceil(torch.log2(lengths_S.double())).long()
    buckets: list[SegmentBucket] = []
    scatter = torch.empty(len(own_tokens), dtype=torch.int64)
    row = 0
    for ceiling in ceilings_S.unique().tolist():
        members = (ceilings_S == ceiling).nonzero().squeeze(1)
        keys_SK = _padded(lengths_S[members]) + starts_S[members].unsqueeze(1)
        is_query_SK = is_own_T[keys_SK] & _is_real(lengths_S[members])
        has_queries_S = is_query_SK.any(1)
        if not bool(has_queries_S.any()):
            continue
        keys_SK, is_query_SK = keys_SK[has_queries_S], is_query_SK[has_queries_S]
        # The offsets of the real queries first, in order; a stable sort keeps it.
        num_queries_S = is_query_SK.sum(1)
        order_SK = torch.argsort((~is_query_SK).int(), dim=1, stable=True)
        offsets_SL = order_SK.gather(1, _padded(num_queries_S))
        tokens_SL = keys_SK.gather(1, offsets_SL)
        rows_SL = row + torch.arange(tokens_SL.numel()).view_as(tokens_SL)
        is_real_SL = _is_real(num_queries_S)
        scatter[own_row_T[tokens_SL[is_real_SL]]] = rows_SL[is_real_SL]
        buckets.append(
            SegmentBucket(
                query_SL=own_row_T[tokens_SL],
                query_offsets_SL=offsets_SL,
                key_SK=gathered_row_T[keys_SK],
                is_whole=cp == 1,
            )
        )
        row += tokens_SL.numel()
    return buckets, scatter


def _padded(lengths_S: torch.Tensor) -> torch.Tensor:
    """0, 1, ... up to each length, its last repeated up to the longest; int64 [S, longest]."""
    offsets_SL = torch.arange(int(lengths_S.max())).expand(len(lengths_S), -1)
    return torch.minimum(offsets_SL, (lengths_S - 1).unsqueeze(1))


def _is_real(lengths_S: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(lengths_S.max())) < lengths_S.unsqueeze(1)
