"""Which layers each pipeline stage holds."""

import pytest

from mtrl.models.stages import Stages
from mtrl.parallel.errors import LayoutError

pytestmark = pytest.mark.one_stack

SIZES = [
    (num_layers, pp, num_chunks)
    for pp in (1, 2, 3, 4, 8)
    for num_chunks in ((1, 2, 3) if pp > 1 else (1,))
    for num_layers in (*range(pp * num_chunks, pp * num_chunks + 9), 48, 61, 94)
]


@pytest.mark.parametrize(("num_layers", "pp", "num_chunks"), SIZES)
def test_stages_hold_every_layer_once_in_order_and_as_evenly_as_can_be(
    num_layers: int, pp: int, num_chunks: int
) -> None:
    stages = Stages.balanced(num_layers, pp, num_chunks)
    assert [layer for stage in stages.layers for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages.layers]
    assert len(sizes) == pp * num_chunks and stages.num_chunks == num_chunks
    assert max(sizes) - min(sizes) <= 1
    assert stages.is_even == (num_layers % (pp * num_chunks) == 0)
    # The embedding and the output layer are work too: who holds them gets no layer before the others.
    assert sizes[0] == min(sizes)
    if any(size == min(sizes) for size in sizes[1:]):
        assert sizes[-1] == min(sizes)


@pytest.mark.parametrize(("num_layers", "pp", "num_chunks"), SIZES)
def test_the_chunks_of_all_ranks_are_the_stages_dealt_round(
    num_layers: int, pp: int, num_chunks: int
) -> None:
    stages = Stages.balanced(num_layers, pp, num_chunks)
    dealt = [stages.chunk_layers(rank, chunk) for chunk in range(num_chunks) for rank in range(pp)]
    assert dealt == list(stages.layers)
    ends = [(rank, chunk) for chunk in range(num_chunks) for rank in range(pp)]
    assert [end for end in ends if stages.is_first(*end)] == [ends[0]]
    assert [end for end in ends if stages.is_last(*end)] == [ends[-1]]


@pytest.mark.parametrize(
    ("num_layers", "pp", "num_chunks", "message"),
    [
        (3, 4, 1, "3 layers cannot fill 4 pipeline stages (p4 x 1 chunks); use p3 or less"),
        (5, 3, 2, "5 layers cannot fill 6 pipeline stages (p3 x 2 chunks); use p2 or less"),
        (1, 2, 2, "1 layers cannot fill 4 pipeline stages (p2 x 2 chunks); use p1 or less"),
    ],
)
def test_too_many_stages_are_refused_with_the_number_that_fits(
    num_layers: int, pp: int, num_chunks: int, message: str
) -> None:
    with pytest.raises(LayoutError) as raised:
        Stages.balanced(num_layers, pp, num_chunks)
    assert str(raised.value) == message
