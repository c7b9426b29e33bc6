"""The algebra of weights: where every element of a tensor stands in the Hugging Face checkpoint.

A *view* is a named tensor whose dims are split into factors and permuted. A *box* is a range per dim
of a view. A *piece* says "this box of that checkpoint view is that box of this local parameter's
view"; both boxes have the same shape, so moving a piece is one strided copy in either direction.

Loading, exporting, checkpointing and the push into an engine are intersections of boxes and copies
of pieces. Everything here is integers and strings; ``pieces.py`` applies it to tensors.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """A range ``[start, stop)`` for each dim. A box of no dims holds one element.

    >>> Box(((0, 2), (3, 7))).shape
    (2, 4)
    """

    ranges: tuple[Range, ...]

    @classmethod
    def full(cls, shape: Iterable[int]) -> "Box":
        """The box that covers a tensor of ``shape``."""
        return cls(tuple((0, size) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each range."""
        return tuple(stop - start for start, stop in self.ranges)

    @property
    def num_elements(self) -> int:
        """How many elements lie in the box."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index for a tensor or a safetensors slice."""
        return tuple(slice(start, stop) for start, stop in self.ranges)

    def intersect(self, other: "Box") -> "Box | None":
        """The elements in both, or None if there are none."""
        ranges = tuple(
            (max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.ranges, other.ranges, strict=True)
        )
        return Box(ranges) if all(start < stop for start, stop in ranges) else None

    def subtract(self, other: "Box") -> tuple["Box", ...]:
        """Disjoint boxes that hold the elements of self that are not in ``other``.

        At most two boxes a dim: what lies before and after ``other`` along it.
        """
        common = self.intersect(other)
        if common is None:
            return (self,)
        rest: list[Box] = []
        core = list(self.ranges)
        for dim, ((start, stop), (low, high)) in enumerate(zip(self.ranges, common.ranges, strict=True)):
            for part in ((start, low), (high, stop)):
                if part[0] < part[1]:
                    rest.append(Box((*core[:dim], part, *core[dim + 1 :])))
            core[dim] = (low, high)
        return tuple(rest)

    def relative_to(self, outer: "Box") -> "Box":
        """The same elements, counted from the corner of ``outer``."""
        return Box(
            tuple((a - low, b - low) for (a, b), (low, _) in zip(self.ranges, outer.ranges, strict=True))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A named tensor seen with split and permuted dims.

    ``shape`` is the tensor's own shape. ``factors[i]`` splits dim ``i``, outermost first (their
    product is ``shape[i]``). Dim ``k`` of the view is factor ``order[k]`` of all factors in sequence.

    >>> View(name="w", shape=(6, 4), factors=((2, 3), (4,)), order=(1, 0, 2)).view_shape
    (3, 2, 4)
    """

    name: str
    shape: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        products = tuple(math.prod(factors) for factors in self.factors)
        assert products == self.shape, f"{self.name}: factors {self.factors} do not make {self.shape}"
        assert sorted(self.order) == list(range(len(self.flat_factors))), f"{self.name}: {self.order}"

    @property
    def flat_factors(self) -> tuple[int, ...]:
        """All factors in sequence: the shape to reshape the tensor to before permuting."""
        return tuple(itertools.chain.from_iterable(self.factors))

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        flat = self.flat_factors
        return tuple(flat[index] for index in self.order)

    def unpermute(self, box: Box) -> tuple[tuple[Range, ...], ...]:
        """A box of the view as ranges of the factors of each dim of the tensor."""
        by_factor = dict(zip(self.order, box.ranges, strict=True))
        indices = iter(range(len(self.order)))
        return tuple(tuple(by_factor[next(indices)] for _ in factors) for factors in self.factors)

    def stored_box(self, box: Box) -> Box | None:
        """The box of the tensor itself that holds exactly the elements of ``box``, if there is one."""
        ranges: list[Range] = []
        for factors, parts in zip(self.factors, self.unpermute(box), strict=True):
            merged = _merge(factors, parts)
            if merged is None:
                return None
            ranges.append(merged)
        return Box(tuple(ranges))

    def split_until_stored(self, box: Box) -> Iterator[Box]:
        """Cut ``box`` into the fewest boxes, along outer factors, that each are one stored box."""
        if self.stored_box(box) is not None:
            yield box
            return
        per_factor = list(itertools.chain.from_iterable(self.unpermute(box)))
        cuts: list[list[Range]] = []
        index = 0
        for factors in self.factors:
            parts = per_factor[index : index + len(factors)]
            if _merge(factors, tuple(parts)) is not None:
                cuts.extend([part] for part in parts)
            else:
                keep = _first_mergeable(factors, tuple(parts))
                cuts.extend([(i, i + 1) for i in range(*part)] for part in parts[:keep])
                cuts.extend([part] for part in parts[keep:])
            index += len(factors)
        for combination in itertools.product(*cuts):
            yield Box(tuple(combination[index] for index in self.order))


def _merge(factors: tuple[int, ...], parts: tuple[Range, ...]) -> Range | None:
    """Ranges of the factors of one dim as one range of that dim, or None if they are not contiguous."""
    start, length, run_is_open = 0, 1, True
    stride = math.prod(factors)
    for size, (low, high) in zip(factors, parts, strict=True):
        stride //= size
        start += low * stride
        if run_is_open:
            if high - low != 1:
                length, run_is_open = (high - low) * stride, False
        elif (low, high) != (0, size):
            return None
    return (start, start + length)


def _first_mergeable(factors: tuple[int, ...], parts: tuple[Range, ...]) -> int:
    """How many outer factors must be cut to single indices before the rest is contiguous."""
    for keep in range(len(factors)):
        if _merge(factors[keep:], parts[keep:]) is not None:
            return keep
    return len(factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """``hf_box`` of the checkpoint view ``hf`` is ``local_box`` of the local parameter view ``local``.

    ``local.name`` is the parameter's name in chunk number ``chunk`` of this rank's pipeline chunks.
    """

    hf: View
    hf_box: Box
    local: View
    local_box: Box
    chunk: int = 0

    def __post_init__(self) -> None:
        assert self.hf_box.shape == self.local_box.shape, f"{self.hf.name} -> {self.local.name}"

    @property
    def stored(self) -> Box:
        """The box of the Hugging Face tensor that this piece is. Only for pieces from ``simple``."""
        box = self.hf.stored_box(self.hf_box)
        assert box is not None, f"{self.hf.name}: {self.hf_box} is several boxes of the stored tensor"
        return box

    def simple(self) -> Iterator["Piece"]:
        """This piece cut into pieces that each are one box of the stored Hugging Face tensor."""
        for box in self.hf.split_until_stored(self.hf_box):
            offset = box.relative_to(self.hf_box)
            local = Box(
                tuple(
                    (low + a, low + b)
                    for (a, b), (low, _) in zip(offset.ranges, self.local_box.ranges, strict=True)
                )
            )
            yield Piece(hf=self.hf, hf_box=box, local=self.local, local_box=local, chunk=self.chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """``local_box`` of a local parameter holds ``value`` and nothing of the checkpoint."""

    local: View
    local_box: Box
    value: float = 0.0
    chunk: int = 0


def parse_pattern(pattern: str) -> tuple[tuple[str, ...], ...]:
    """Split an einops-like pattern into the symbols of each dim.

    >>> parse_pattern("(g r d) h")
    (('g', 'r', 'd'), ('h',))
    """
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            assert group, f"empty group in {pattern!r}"
            dims.append(tuple(group))
            group = None
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    assert group is None, f"unclosed group in {pattern!r}"
    return tuple(dims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a weight of some role lies in a named tensor, on either side.

    ``name`` may hold ``{layer}`` and ``{expert}``. ``pattern`` names the tensor's dims by symbols,
    einops-like: ``"(g r d) h"``. ``within`` gives, for a symbol that shares its factor with other
    weights, its offset and the factor's whole extent: the up projection in a fused gate|up tensor
    ``"(u i) h"`` has ``within={"u": (1, 2)}``.
    """

    name: str
    pattern: str
    within: tuple[tuple[str, int, int], ...] = ()

    def view(self, symbols: tuple[str, ...], extents: dict[str, int], **names: int) -> View:
        """The view whose dims are ``symbols`` in that order.

        A symbol absent from the pattern (the expert, when each has a tensor of its own) becomes a
        dim of size 1.
        """
        sizes = dict(extents)
        sizes.update({symbol: extent for symbol, _, extent in self.within})
        dims = [list(dim) for dim in parse_pattern(self.pattern)]
        missing = [symbol for symbol in symbols if not any(symbol in dim for dim in dims)]
        for symbol in missing:
            sizes[symbol] = 1
            dims[0].insert(0, symbol)
        flat = list(itertools.chain.from_iterable(dims))
        assert sorted(flat) == sorted(symbols), f"{self.name}: {self.pattern!r} against {symbols}"
        factors = tuple(tuple(sizes[symbol] for symbol in dim) for dim in dims)
        return View(
            name=self.name.format(**names),
            shape=tuple(math.prod(dim) for dim in factors),
            factors=factors,
            order=tuple(flat.index(symbol) for symbol in symbols),
        )

    def box(self, symbols: tuple[str, ...], ranges: dict[str, Range]) -> Box:
        """The box of that view for a range per symbol; ``within`` shifts its symbols."""
        offsets = {symbol: offset for symbol, offset, _ in self.within}
        named = {symbol for dim in parse_pattern(self.pattern) for symbol in dim}
        shifted = []
        for symbol in symbols:
            start, stop = ranges[symbol] if symbol in named else (0, 1)
            shifted.append((start + offsets.get(symbol, 0), stop + offsets.get(symbol, 0)))
        return Box(tuple(shifted))
