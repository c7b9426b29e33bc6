"""Recording what a loader does, and the geometry of what it did."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtrl.parallel.errors import WeightError
from mtrl.rollout.loader_record import LoaderRecord, Region, contiguous_stride, record_loader

Loader = Callable[[dict[str, Tensor], str, Tensor], None]


def record(loader: Loader, sources: dict[str, tuple[int, ...]], live: dict[str, Tensor]) -> LoaderRecord:
    def load(named: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            loader(live, name, tensor)

    return record_loader(load, sources, live, torch.float32)


def replay(recorded: LoaderRecord, sources: dict[str, Tensor], live: dict[str, Tensor]) -> None:
    for fill in recorded.fills:
        fill.region.of(live[fill.destination]).fill_(fill.value)
    for copy in recorded.copies:
        target = copy.destination_region.of(live[copy.destination])
        target.copy_(copy.source_region.of(sources[copy.source]))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    stops = [draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True)]
    return shape, tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


@given(boxes())
def test_the_box_of_a_slice_is_that_slice(case: tuple[tuple[int, ...], tuple[slice, ...]]) -> None:
    shape, slices = case
    owner = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    view = owner[slices]
    region = Region(shape=tuple(view.shape), stride=tuple(view.stride()), offset=int(view.storage_offset()))
    box = region.box(shape)
    assert box is not None
    assert torch.equal(owner[tuple(slice(*each) for each in box)], view)


@given(boxes())
def test_a_region_finds_its_view_again(case: tuple[tuple[int, ...], tuple[slice, ...]]) -> None:
    shape, slices = case
    owner = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    view = owner[slices]
    region = Region(shape=tuple(view.shape), stride=tuple(view.stride()), offset=int(view.storage_offset()))
    assert torch.equal(region.of(owner), view)


def test_a_transposed_region_is_no_box() -> None:
    view = torch.zeros(4, 6).T
    region = Region(shape=tuple(view.shape), stride=tuple(view.stride()), offset=0)
    assert region.box((4, 6)) is None


def test_a_repeated_element_is_no_box() -> None:
    view = torch.zeros(4, 1).expand(4, 6)
    region = Region(shape=tuple(view.shape), stride=tuple(view.stride()), offset=0)
    assert region.box((4, 1)) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_strides_are_those_of_torch(shape: list[int]) -> None:
    assert contiguous_stride(tuple(shape)) == torch.empty(shape).stride()


def _split(live: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """The second half of the rows of q and k, stacked, and padding; as tensor parallel loaders do."""
    row = {"q": 0, "k": 2}[name]
    live["qk"].narrow(0, row, 2).copy_(tensor.chunk(2)[1].narrow(1, 1, 3))
    live["qk"][4:].data.fill_(0)


def test_a_replayed_record_does_what_the_loader_did() -> None:
    sources = {"q": torch.randn(4, 5), "k": torch.randn(4, 5)}
    loaded, replayed = {"qk": torch.full((5, 3), 7.0)}, {"qk": torch.full((5, 3), 7.0)}
    for name, tensor in sources.items():
        _split(loaded, name, tensor)
    replay(record(_split, {"q": (4, 5), "k": (4, 5)}, replayed), sources, replayed)
    assert torch.equal(loaded["qk"], replayed["qk"])


def test_recording_changes_nothing() -> None:
    live = {"qk": torch.full((5, 3), 7.0)}
    recorded = record(_split, {"q": (4, 5)}, live)
    assert torch.equal(live["qk"], torch.full((5, 3), 7.0))
    assert recorded.copies[0].source_region.box((4, 5)) == ((2, 4), (1, 4))


def test_a_broadcast_copy_is_replayed() -> None:
    def loader(live: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        live["w"].copy_(tensor)

    live = {"w": torch.zeros(2, 3)}
    source = torch.tensor([[1.0], [2.0]])
    replay(record(loader, {"s": (2, 1)}, live), {"s": source}, live)
    assert torch.equal(live["w"], source.expand(2, 3))


@pytest.mark.parametrize(
    "compute",
    [
        lambda live, tensor: live.copy_(tensor * 2),
        lambda live, tensor: live.add_(tensor),
        lambda live, tensor: live.copy_(torch.ones(3)),
        lambda live, tensor: live.copy_(tensor.to(torch.bfloat16)),
    ],
)
def test_what_is_not_a_plain_copy_is_refused(compute: Callable[[Tensor, Tensor], object]) -> None:
    def loader(live: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        compute(live["w"], tensor)

    with pytest.raises(WeightError):
        record(loader, {"s": (3,)}, {"w": torch.zeros(3)})


def test_a_name_that_the_loader_does_not_know_is_refused() -> None:
    with pytest.raises(WeightError, match="w9"):
        record(_split, {"w9": (4, 5)}, {"qk": torch.zeros(5, 3)})


def test_an_element_without_a_weight_is_refused() -> None:
    live = {"qk": torch.zeros(5, 3)}
    with pytest.raises(WeightError, match="6 of 15 elements of the engine's qk"):
        record(_split, {"q": (4, 5)}, live).check_complete(live, live)


def test_an_element_written_twice_is_refused() -> None:
    def loader(live: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        live["w"].copy_(tensor)

    live = {"w": torch.zeros(3)}
    with pytest.raises(WeightError, match="another weight"):
        record(loader, {"s": (3,), "t": (3,)}, live).check_complete(live, live)


def test_records_of_parts_join_to_the_record_of_the_whole() -> None:
    def loader(live: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        live[name].copy_(tensor)

    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    parts = [record(loader, {name: tuple(tensor.shape)}, live) for name, tensor in live.items()]
    whole = record(loader, {"a": (2,), "b": (3,)}, live)
    assert parts[0].joined(parts[1]) == whole
    with pytest.raises(WeightError, match="twice"):
        whole.joined(parts[0])
