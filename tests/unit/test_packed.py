"""Packed attention equals attention to each segment by itself, whatever the lengths."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtrl.models.backends.torch_native.attention import CoreAttention
from mtrl.models.backends.torch_native.experts import grouped_linear
from mtrl.models.backends.torch_native.rotary import PackedRotary
from mtrl.models.config import RopeConfig
from mtrl.models.packed import PackedSegments, zigzag_tokens
from tests.property import strategies  # noqa: F401  its Hypothesis profile

CPU = torch.device("cpu")
lengths_of_segments = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths_of_segments)
def test_every_token_has_one_row_and_positions_begin_anew_in_each_segment(lengths: list[int]) -> None:
    packed = PackedSegments.from_lengths(lengths, CPU)
    assert packed.positions_T is not None and packed.scatter_T is not None
    assert packed.positions_T.tolist() == [place for length in lengths for place in range(length)]
    rows = torch.cat([bucket.query_SL.flatten() for bucket in packed.buckets])
    assert rows[packed.scatter_T].tolist() == list(range(sum(lengths)))


@given(lengths_of_segments)
def test_a_row_of_a_bucket_holds_one_segment_and_at_most_as_much_padding_as_tokens(
    lengths: list[int],
) -> None:
    packed = PackedSegments.from_lengths(lengths, CPU)
    segment_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    found = []
    for bucket in packed.buckets:
        for row in bucket.query_SL.tolist():
            (segment,) = {segment_of[token] for token in row}
            length = lengths[segment]
            assert row == sorted(row) and set(row[length:]) <= {row[length - 1]}
            assert len(row) < 2 * length or len(row) == length
            found.append(segment)
    assert sorted(found) == list(range(len(lengths)))


@settings(max_examples=30)
@example([7, 7, 7], (4, 2), False)  # alike in length: nothing is gathered
@given(lengths_of_segments, st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.booleans())
def test_packed_attention_is_that_of_each_segment_alone(
    lengths: list[int], heads: tuple[int, int], scaled: bool
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    scale = 0.3 if scaled else None
    attention = CoreAttention(None, 1, softmax_scale=scale)  # type: ignore[arg-type]
    query, key, value = (
        torch.randn(sum(lengths), number, 8, generator=generator) for number in (heads[0], heads[1], heads[1])
    )
    found = attention(query, key, value, packed_seq_params=PackedSegments.from_lengths(lengths, CPU))
    alone = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        repeated = (x.transpose(0, 1).repeat_interleave(heads[0] // x.shape[1], 0) for x in (k, v))
        whole = F.scaled_dot_product_attention(q.transpose(0, 1), *repeated, is_causal=True, scale=scale)
        alone.append(whole.transpose(0, 1).flatten(1))
        dense = attention(q[:, None], k[:, None], v[:, None])
        assert torch.allclose(dense[:, 0], alone[-1], atol=1e-6)
    assert torch.allclose(found, torch.cat(alone), atol=1e-6)


def test_no_gradient_crosses_from_one_segment_to_another() -> None:
    attention = CoreAttention(None, 1)  # type: ignore[arg-type]
    query, key, value = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    found = attention(query, key, value, packed_seq_params=PackedSegments.from_lengths([4, 5], CPU))
    found[4:].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad[:4].any() and tensor.grad[4:].any()


def test_rotary_frequencies_are_those_of_positions_within_segments() -> None:
    rotary = PackedRotary(RopeConfig(theta=10000.0), 8, cp_group=None, on_cpu=True)
    found = rotary(PackedSegments.from_lengths([3, 2], CPU))
    angles = torch.outer(torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0]), rotary.inv_freq)
    assert torch.equal(found[:, 0, 0], torch.cat([angles, angles], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 5], [0, 0, 0]])
@pytest.mark.parametrize(("size_in", "size_out"), [(16, 8), (16, 10), (10, 16), (3, 5)])
def test_a_grouped_product_is_that_of_each_expert_whatever_the_sizes(
    dtype: torch.dtype, counts: list[int], size_in: int, size_out: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), size_in, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, size_out, size_in, generator=generator).to(dtype).requires_grad_()
    slope = torch.randn(sum(counts), size_out, generator=generator).to(dtype)
    found = grouped_linear(x, weight, torch.tensor(counts))
    expected = torch.cat([part @ each.T for part, each in zip(x.split(counts), weight, strict=True)])
    grads = torch.autograd.grad(found, (x, weight), slope)
    # One product against another of the same numbers: the last bits of the dtype.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(found, expected, **tolerance)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (x, weight), slope), strict=True):
        assert torch.allclose(ours, theirs, **tolerance)


@given(st.integers(1, 8), st.integers(1, 5))
def test_context_parallel_ranks_have_each_token_of_a_row_once_and_two_chunks_each(cp: int, size: int) -> None:
    total = 2 * cp * size
    shares = [zigzag_tokens(total, cp, rank).tolist() for rank in range(cp)]
    assert sorted(token for share in shares for token in share) == list(range(total))
    assert all(len(share) == total // cp for share in shares)
    if cp > 1:  # what a causal row of one sample costs: as many (query, key) pairs on every rank
        assert len({sum(share) for share in shares}) == 1


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One segment [L, H, D], every step written out."""
    length, num_heads = query.shape[:2]
    key, value = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    logits = logits.masked_fill((distance < 0) | (distance >= (window or length)), -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[:, None, None].expand(-1, length, 1)), -1)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., :length], value).flatten(1)


@settings(max_examples=30)
@given(lengths_of_segments, st.sampled_from([1, 2, 3, 4]), st.sampled_from([0, 1, 5]), st.booleans())
def test_every_rank_attends_to_what_its_tokens_see_windows_and_sinks_included(
    lengths: list[int], cp: int, window: int, has_sinks: bool
) -> None:
    lengths = [*lengths, -sum(lengths) % (2 * cp) or 2 * cp]  # padding, as a segment of its own
    generator = torch.Generator().manual_seed(sum(lengths))
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    expected = torch.cat([attend_plainly(q, k, v, window, sinks) for q, k, v in parts])
    shares = [zigzag_tokens(sum(lengths), cp, rank) for rank in range(cp)]
    gathered = torch.cat(shares)
    for rank, share in enumerate(shares):
        attention = CoreAttention(None, 1, window=window)  # type: ignore[arg-type]
        attention.softmax_offset = None if sinks is None else torch.nn.Parameter(sinks)
        packed = PackedSegments.from_lengths(lengths, CPU, cp=cp, cp_rank=rank)
        # Without a process group the module gathers nothing: it is given what it would have gathered.
        found = attention(query[share], key[gathered], value[gathered], packed_seq_params=packed)
        torch.testing.assert_close(found, expected[share], rtol=1e-5, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), cp=st.sampled_from((1, 2, 4)))
def test_spans_show_each_query_its_segment_up_to_itself(lengths: list[int], cp: int) -> None:
    lengths = [*lengths, -sum(lengths) % (2 * cp) or 2 * cp]
    total = sum(lengths)
    gathered = torch.cat([zigzag_tokens(total, cp, rank) for rank in range(cp)])
    starts = [sum(lengths[:number]) for number, length in enumerate(lengths) for _ in range(length)]
    for rank in range(cp):
        spans = PackedSegments.from_lengths(lengths, CPU, cp=cp, cp_rank=rank).spans
        own, seen = zigzag_tokens(total, cp, rank).tolist(), gathered[spans.key_rows].tolist()
        queries = list(itertools.pairwise(spans.query_bounds.tolist()))
        keys = list(itertools.pairwise(spans.key_bounds.tolist()))
        assert queries[-1][1] == len(own) and keys[-1][1] == len(seen)
        for (low, high), (start, stop) in zip(queries, keys, strict=True):
            for place in range(low, high):
                # The last query of a span sees all its keys, each before it one fewer.
                visible = seen[start : stop - (high - 1 - place)]
                assert visible == list(range(starts[own[place]], own[place] + 1))
        assert spans.longest_query == max(high - low for low, high in queries)
        assert spans.longest_key == max(stop - start for start, stop in keys)
