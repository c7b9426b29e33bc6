from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtrl.batch import Sample
from mtrl.packing import default_cost, pack, plan_microbatches, unpack, unpack_predictions
from mtrl.parallel.errors import ConfigError

PAD = 0
# Exactly a float32, so that the way into a tensor and back is the identity.
float32 = st.floats(-20, 0, width=32)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    length = draw(st.integers(1, 12))
    loss_mask = (False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)))
    logprobs = [draw(float32) if flag else 0.0 for flag in loss_mask] if draw(st.booleans()) else []
    return Sample(
        sample_id=draw(st.integers(0, 1000)),
        tokens=tuple(draw(st.lists(st.integers(1, 99), min_size=length, max_size=length))),
        loss_mask=loss_mask,
        sampler_logprobs=tuple(logprobs),
        advantage=draw(st.floats(-3, 3, width=32)),
    )


batches = st.lists(samples(), max_size=6)
plans = {
    "lengths": st.lists(st.integers(1, 100), max_size=60),
    "num_dp": st.integers(1, 8),
    "max_tokens": st.integers(100, 400),
    "multiple_of": st.integers(1, 4),
}


@given(**plans)
def test_a_plan_loses_and_repeats_nothing_and_fits_every_rank(
    lengths: list[int], num_dp: int, max_tokens: int, multiple_of: int
) -> None:
    plan = plan_microbatches(lengths, num_dp=num_dp, max_tokens=max_tokens, multiple_of=multiple_of)
    placed = [index for rank in plan for microbatch in rank for index in microbatch]
    assert sorted(placed) == list(range(len(lengths)))
    assert len(plan) == num_dp
    (num_microbatches,) = {len(rank) for rank in plan}
    assert num_microbatches >= 1 and num_microbatches % multiple_of == 0
    assert all(sum(lengths[index] for index in each) <= max_tokens for rank in plan for each in rank)
    assert plan == plan_microbatches(lengths, num_dp=num_dp, max_tokens=max_tokens, multiple_of=multiple_of)


@given(**plans)
def test_no_microbatch_is_empty_unless_samples_are_too_few(
    lengths: list[int], num_dp: int, max_tokens: int, multiple_of: int
) -> None:
    plan = plan_microbatches(lengths, num_dp=num_dp, max_tokens=max_tokens, multiple_of=multiple_of)
    num_empty = sum(not microbatch for rank in plan for microbatch in rank)
    assert num_empty == max(0, num_dp * len(plan[0]) - len(lengths))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    num_dp=st.integers(1, 8),
    multiple_of=st.integers(1, 4),
)
def test_where_tokens_do_not_bind_costs_are_within_one_sample_of_each_other(
    lengths: list[int], num_dp: int, multiple_of: int
) -> None:
    plan = plan_microbatches(lengths, num_dp=num_dp, max_tokens=sum(lengths) * 2, multiple_of=multiple_of)
    costs = [[sum(default_cost(lengths[index]) for index in each) for each in rank] for rank in plan]
    largest = max(map(default_cost, lengths))
    every = [cost for rank in costs for cost in rank]
    assert max(every) - min(every) <= largest + 1e-9
    # Dealt there and back, ranks differ by no more than two microbatches may.
    assert max(map(sum, costs)) - min(map(sum, costs)) <= largest + 1e-9


def test_microbatches_of_one_index_are_alike_over_the_ranks() -> None:
    lengths = [100] * 4 + [60] * 4 + [10] * 4
    plan = plan_microbatches(lengths, num_dp=4, max_tokens=100)
    tokens = [[sum(lengths[index] for index in each) for each in rank] for rank in plan]
    assert tokens == [[100, 70]] * 4


def test_attention_makes_one_long_sample_dearer_than_as_many_tokens_in_short_ones() -> None:
    lengths = [32768, *[4096] * 16]
    (first,), (second,) = plan_microbatches(lengths, num_dp=2, max_tokens=98304)
    assert len(first) + len(second) == 17
    long, short = (first, second) if 0 in first else (second, first)
    assert sum(lengths[index] for index in long) < sum(lengths[index] for index in short)


def test_few_samples_leave_empty_microbatches_which_are_rows_of_padding() -> None:
    plan = plan_microbatches([5, 3], num_dp=4, max_tokens=8)
    assert sorted(plan) == [((),), ((),), ((0,),), ((1,),)]
    packed = pack([], pad_to=1, pad_token_id=PAD)
    assert packed.tokens_T.tolist() == [PAD] and packed.num_loss_tokens == 0
    assert packed.cu_seqlens.tolist() == [0, 1] and packed.sample_ids == ()


def test_a_sample_longer_than_a_microbatch_is_refused_with_the_fix() -> None:
    with pytest.raises(
        ConfigError, match=r"sample 1 of the batch has 9 tokens.*at most 8; raise .* to 9 or more"
    ):
        plan_microbatches([5, 9], num_dp=1, max_tokens=8)


@given(batch=batches, num_padding=st.integers(0, 5))
def test_unpacking_undoes_packing(batch: list[Sample], num_padding: int) -> None:
    pad_to = sum(len(sample.tokens) for sample in batch) + num_padding
    packed = pack(batch, pad_to=max(1, pad_to), pad_token_id=PAD)
    assert packed.sample_ids == tuple(sample.sample_id for sample in batch)
    assert unpack(packed, packed.tokens_T) == tuple(sample.tokens for sample in batch)
    assert unpack(packed, packed.positions_T) == tuple(tuple(range(len(sample.tokens))) for sample in batch)
    assert unpack_predictions(packed, packed.loss_mask_T) == tuple(sample.loss_mask for sample in batch)
    assert unpack_predictions(packed, packed.sampler_logprobs_T) == tuple(
        sample.sampler_logprobs or (0.0,) * len(sample.tokens) for sample in batch
    )
    assert unpack_predictions(packed, packed.advantages_T) == tuple(
        tuple(sample.advantage if flag else 0.0 for flag in sample.loss_mask) for sample in batch
    )


@given(batch=batches, num_padding=st.integers(0, 5))
def test_segments_cover_the_row_and_targets_never_leave_a_sample(
    batch: list[Sample], num_padding: int
) -> None:
    pad_to = max(1, sum(len(sample.tokens) for sample in batch) + num_padding)
    packed = pack(batch, pad_to=pad_to, pad_token_id=PAD)
    bounds = packed.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == pad_to
    lengths = [after - before for before, after in pairwise(bounds)]
    assert min(lengths) >= 1 and max(lengths) == packed.max_seqlen
    assert len(lengths) - len(batch) in (0, 1)
    for start, end in pairwise(bounds):
        assert packed.targets_T[start : end - 1].tolist() == packed.tokens_T[start + 1 : end].tolist()
        assert packed.targets_T[end - 1] == PAD and not packed.loss_mask_T[end - 1]
    assert packed.num_loss_tokens == sum(sample.num_loss_tokens for sample in batch)
    if len(lengths) > len(batch):
        assert not packed.positions_T[bounds[-2] :].any() and not packed.loss_mask_T[bounds[-2] :].any()


def test_a_small_row_by_hand() -> None:
    first = Sample(
        sample_id=7,
        tokens=(5, 6, 7),
        loss_mask=(False, False, True),
        sampler_logprobs=(0.0, 0.0, -0.5),
        advantage=2.0,
    )
    second = Sample(sample_id=8, tokens=(8, 9), loss_mask=(False, True), advantage=-1.0)
    packed = pack([first, second], pad_to=7, pad_token_id=PAD)
    assert packed.tokens_T.tolist() == [5, 6, 7, 8, 9, PAD, PAD]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert packed.targets_T.tolist() == [6, 7, PAD, 9, PAD, PAD, PAD]
    assert packed.loss_mask_T.tolist() == [False, True, False, True, False, False, False]
    assert packed.sampler_logprobs_T.tolist() == [0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert packed.advantages_T.tolist() == [0.0, 2.0, 0.0, -1.0, 0.0, 0.0, 0.0]
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert (packed.max_seqlen, packed.sample_ids) == (3, (7, 8))


def test_the_tensors_have_the_types_that_kernels_take_and_move_together() -> None:
    packed = pack([], pad_to=2, pad_token_id=PAD).to(torch.device("meta"))
    int64, float_ = torch.int64, torch.float32
    assert [packed.tokens_T.dtype, packed.positions_T.dtype, packed.targets_T.dtype] == [int64] * 3
    assert [packed.sampler_logprobs_T.dtype, packed.advantages_T.dtype] == [float_] * 2
    assert (packed.loss_mask_T.dtype, packed.cu_seqlens.dtype) == (torch.bool, torch.int32)
    tensors = [value for name in packed.__slots__ if torch.is_tensor(value := getattr(packed, name))]
    assert len(tensors) == 7 and all(tensor.device.type == "meta" for tensor in tensors)


def test_attention_within_segments_equals_attention_of_each_sample_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = [
        Sample(sample_id=length, tokens=tuple(range(1, length + 1)), loss_mask=(False,) * length)
        for length in (3, 1, 4)
    ]
    packed = pack(batch, pad_to=11, pad_token_id=PAD)
    vectors = torch.randn(11, 8, generator=generator)
    segment_T = torch.bucketize(torch.arange(11), packed.cu_seqlens[1:].long(), right=True)
    allowed = (segment_T[:, None] == segment_T[None, :]).tril()
    together = torch.nn.functional.scaled_dot_product_attention(
        vectors[None], vectors[None], vectors[None], attn_mask=allowed
    )[0]
    bounds = packed.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        part = vectors[None, start:end]
        alone = torch.nn.functional.scaled_dot_product_attention(part, part, part, is_causal=True)[0]
        # Same sums in another order, float32 of size 1.
        torch.testing.assert_close(together[start:end], alone, rtol=0, atol=1e-6)
