"""Which pairs of layout and family the parity suite runs: every legal layout, and sets that cover all
features.

A *feature* is a choice such as "tp > 1" or "family olmoe"; a set covers when every two features that can meet
meet in one of its pairs.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

from mtrl.parallel.spec import ParallelSpec, parse_training_spec
from tests.distributed.parity import DEEP, WIDE, Pair
from tests.family_toys import FAMILY_TOYS

WORLD_SIZES = (1, 2, 3, 4, 6, 8)
DENSE = ("llama", "llama tied", "qwen2", "qwen2 tied", "qwen3")
NUM_LAYERS = 4
"""Of every toy but the deep one."""
Features = frozenset[tuple[str, object]]


def legal_specs(world_sizes: Sequence[int] = WORLD_SIZES) -> Iterator[str]:
    """Every legal training spec of these world sizes, each layout once."""
    for world in world_sizes:
        for dp, pp, tp, cp in _factors(world, 4):
            for edp, etp, ep in _factors(world // pp, 3):
                yield f"megatron:(attn:d{dp}p{pp}t{tp}c{cp}|ffn:d{edp}p{pp}t{etp}e{ep})"


def _factors(product: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for rest in _factors(product // first, count - 1):
                yield (first, *rest)


def features(pair: Pair) -> Features:
    """The choices that a pair makes."""
    spec = parse_training_spec(pair.spec)
    return frozenset(
        {
            ("family", pair.toy),
            ("dp", spec.attn.dp > 1),
            ("tp", spec.attn.tp > 1),
            ("cp", spec.attn.cp > 1),
            ("pp", "uneven" if NUM_LAYERS % spec.attn.pp else spec.attn.pp > 1),
            ("virtual", pair.num_chunks > 1),
            ("ep", spec.ffn.ep > 1),
            ("etp", spec.ffn.etp > 1),
            ("edp", spec.ffn.edp > 1),
            ("distributed optimizer", pair.zero),
        }
    )


def candidates(toys: Sequence[str], world_sizes: Sequence[int]) -> Iterator[Pair]:
    """Every pair there could be of these toys and world sizes."""
    for text, toy, zero in itertools.product(legal_specs(world_sizes), toys, (True, False)):
        spec = parse_training_spec(text)
        if toy in DENSE and (spec.ffn.ep > 1 or spec.ffn.etp > 1):
            continue
        if spec.attn.pp > NUM_LAYERS:
            continue
        for num_chunks in (1, 2) if _may_interleave(spec) else (1,):
            yield Pair(spec=text, toy=toy, num_chunks=num_chunks, zero=zero)


def _may_interleave(spec: ParallelSpec) -> bool:
    return spec.attn.pp == 2


def two_features(pair: Pair) -> frozenset[Features]:
    """Every two of a pair's choices."""
    return frozenset(map(frozenset, itertools.combinations(features(pair), 2)))


def layout_and_family(pair: Pair) -> frozenset[Features]:
    """Every two of its layout's choices, and its family."""
    return frozenset(each for each in two_features(pair) if "family" not in dict(each)) | {
        frozenset({("family", pair.toy)})
    }


def covering(
    pool: Sequence[Pair], wanted: Callable[[Pair], frozenset[Features]] = two_features
) -> tuple[Pair, ...]:
    """A small subset that has everything wanted that the pool has: greedy, always the same."""
    offered = {pair: wanted(pair) for pair in pool}
    missing = set().union(*offered.values())
    chosen: list[Pair] = []
    while missing:
        best = max(pool, key=lambda pair: (len(offered[pair] & missing), -pair.size, str(pair)))
        chosen.append(best)
        missing -= offered[best]
    return tuple(chosen)


def every_layout(world_sizes: Sequence[int]) -> Iterator[Pair]:
    """The wide toy under every legal layout, every other one with the distributed optimizer."""
    for number, spec in enumerate(legal_specs(world_sizes)):
        is_deep = parse_training_spec(spec).attn.pp > NUM_LAYERS
        yield Pair(spec=spec, toy=DEEP if is_deep else WIDE, zero=number % 2 == 0)


def all_families() -> tuple[Pair, ...]:
    """Every family, in a set of layouts that covers all features."""
    pool = list(candidates(tuple(FAMILY_TOYS), (1, 2, 3, 4)))
    return covering(pool)


ON_3 = (
    "megatron:(attn:d1p1t1c3|ffn:d3p1t1e1)",
    "megatron:(attn:d1p1t3c1|ffn:d1p1t3e1)",
    "megatron:(attn:d3p1t1c1|ffn:d1p1t1e3)",
)
"""Every axis of size 3, where features see no more than on 2; pipelines of 3 stages are with the families."""
FOLDED_ON_8 = (
    "megatron:(attn:c2p2t2|ffn:t2e2)",
    "megatron:(attn:d2p2t2|ffn:e4)",
    "megatron:(attn:t4c2|ffn:e8)",
)


def suite() -> tuple[Pair, ...]:
    """What CI runs, by world size and layout; in the second environment `both_stacks` alone."""
    mixtures = [toy for toy in FAMILY_TOYS if toy not in DENSE]
    folded = [Pair(spec=spec, toy=toy) for spec, toy in zip(FOLDED_ON_8, mixtures, strict=False)]
    on_3 = [pair for pair in every_layout((3,)) if pair.spec in ON_3]
    pairs = (*every_layout((1, 2)), *on_3, *all_families(), *folded)
    return tuple(sorted(pairs, key=lambda pair: (pair.size, pair.spec, pair.num_chunks, str(pair))))


def both_stacks() -> tuple[Pair, ...]:
    """Of these, what the second environment runs too: every family, and every two choices of a layout."""
    return covering(all_families(), layout_and_family)
