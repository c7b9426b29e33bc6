"""Which rank holds what is carried: every tensor once, about equally much each, the same on every rank."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtrl.models.boxes import Box
from mtrl.models.carried import Carried, share_out

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    max_size=12,
)


@given(shapes=SHAPES, world_size=st.integers(1, 6))
def test_shares_partition_the_names_and_differ_by_at_most_one_tensor(
    shapes: dict[str, tuple[int, ...]], world_size: int
) -> None:
    shares = share_out(shapes, world_size)
    assert len(shares) == world_size
    assert sorted(name for share in shares for name in share) == sorted(shapes)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert share_out(dict(reversed(shapes.items())), world_size) == shares


class Numbers:
    """A source whose tensors say their own dtype."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self.tensors[name][box.slices]


def test_a_share_is_read_whole_in_its_own_dtype_and_replaces_what_was_there() -> None:
    tensors = {"a": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.ones(5), "c": torch.ones(2)}
    ranks = [Carried(), Carried()]
    for rank, carried in enumerate(ranks):
        carried.read(Numbers(tensors), ["a", "b"], rank=rank, world_size=2)
    assert [list(carried.tensors) for carried in ranks] == [["a"], ["b"]]
    assert ranks[0].tensors["a"].dtype == torch.bfloat16 and torch.equal(ranks[0].tensors["a"], tensors["a"])
    assert ranks[0].held == ranks[1].held == (("a",), ("b",))
    ranks[0].read(Numbers(tensors), [], rank=0, world_size=2)
    assert (ranks[0].tensors, ranks[0].shapes, ranks[0].held) == ({}, {}, ((), ()))
