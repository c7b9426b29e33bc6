"""Where the tensors of a weight table lie, in a trainer and in vLLM's engines, without a list of them all.
Pure.

A *kind* is the tensors of one row of the table: all layers' query projections, all experts' gates. They are
split along one dim at most, and in the same way in every layer, so a kind is a few ranges, whatever the
model's size. The trainer's follow from the layout as in ``weight_map.py``. The engine's are vLLM's own rules,
which tests hold against what its loaders do (``loader_record.py``), for every family. Those of FP8 engines
are made from these in ``fp8_kinds.py``.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mtrl.models.boxes import Box, Range, parse_pattern
from mtrl.models.config import ModelConfig
from mtrl.models.families import Weight, family_named
from mtrl.models.roles import ROLE_SYMBOLS, SHARDED_BY, Role
from mtrl.models.stages import Stages
from mtrl.models.weight_map import check_model_fits, padded_vocab_size
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import RolloutSpec
from mtrl.weight_push.flows import Alike, Ranks

VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it splits it (VocabParallelEmbedding)."""

_KEY_VALUE: frozenset[Role] = frozenset(
    ("attention.key", "attention.value", "attention.key_bias", "attention.value_bias")
)
# Their loader transposes them, so that what it reads is no box and the whole tensor is delivered.
_WHOLE: Mapping[str, frozenset[Role]] = {"gpt_oss": frozenset(("expert.gate_up", "expert.down"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """The rollout side: ``spec`` is vLLM's; ``expert_parallel`` as in the config."""

    spec: RolloutSpec
    expert_parallel: bool = False

    def __str__(self) -> str:
        return f"{self.spec} with expert parallelism" if self.expert_parallel else str(self.spec)

    def ranks(self, engine_rank: int) -> Ranks:
        """The ranks at this place of their engines."""
        return tuple(range(engine_rank, self.spec.world_size, self.spec.tp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The tensors of one row of a weight table, and how both sides split them.

    ``name`` may hold ``{layer}`` and ``{expert}``. ``dim`` is the one that is split, if any. ``trainer`` are
    its ranges by tp (etp for experts), ``trainer_experts`` those of experts by ep; ``engine`` and
    ``engine_experts`` by engine rank. ``stages`` has the layers by pipeline rank; of a tensor of the whole
    model, ``(0,)`` for each rank that holds it.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    dim: int | None
    expert_dim: int | None
    num_experts: int
    stages: Mapping[int, tuple[int, ...]]
    trainer: tuple[Range, ...]
    trainer_experts: tuple[Range, ...]
    engine: tuple[Range, ...]
    engine_experts: tuple[Range, ...]

    @property
    def is_per_layer(self) -> bool:
        """Whether each layer has its own."""
        return "{layer}" in self.name

    @property
    def unit(self) -> int:
        """Elements at one index of ``dim`` and one expert (all, and of one expert, where there is none)."""
        others = [size for dim, size in enumerate(self.shape) if dim not in (self.dim, self.expert_dim)]
        return math.prod(others)

    @property
    def overlaps(self) -> bool:
        """Whether ranks of the trainer have ranges that overlap: of scales, where they share blocks."""
        return self.dim is not None and any(a[1] > b[0] for a, b in itertools.pairwise(self.trainer))

    def names(self, layers: Iterable[int], experts: Range = (0, 0)) -> tuple[str, ...]:
        """The tensors of these layers and experts; each of an expert has its own only where the name says
        so.
        """
        numbers = range(*experts) if "{expert}" in self.name else (0,)
        return tuple(self.name.format(layer=layer, expert=expert) for layer in layers for expert in numbers)

    def all_names(self) -> tuple[str, ...]:
        """Every tensor's name, by layer, then by expert."""
        layers = sorted({layer for held in self.stages.values() for layer in held})
        return self.names(layers, (0, self.num_experts))

    def box(self, along: Range, experts: Range) -> Box:
        """This range of ``dim``, and these experts where they are a dim, of the stored tensor."""
        given = {self.dim: along, self.expert_dim: experts}
        return Box(tuple(given.get(dim, (0, size)) for dim, size in enumerate(self.shape)))


def kinds_of(
    config: ModelConfig, layout: RankLayout, engines: Engines, stages: Stages, itemsize: int
) -> tuple[Kind, ...]:
    """Of every row of the family's published table; ``itemsize`` is what a weight has on the wire, bytes, the
    same for all that the family does not keep in float32.

    Raises:
        LayoutError: the model does not fit one side's layout.
    """
    check_model_fits(config, layout.spec)
    check_engines(config, engines)
    found: dict[str, Kind] = {}
    for weight in family_named(config.family).weights(config):
        kind = _kind(weight, config, layout, engines, stages, itemsize)
        same = found.get(kind.name)  # tied: one tensor, held at both ends of the pipeline
        if same is None:
            found[kind.name] = kind
        elif same.stages != kind.stages:
            found[kind.name] = _kind(
                weight, config, layout, engines, stages, itemsize, {**same.stages, **kind.stages}
            )
    return tuple(kind for kind in found.values() if kind.stages and any(kind.stages.values()))


def check_engines(config: ModelConfig, engines: Engines) -> None:
    """Check what vLLM would refuse, or what is not known of it; not whether FP8's blocks stay whole.

    Raises:
        LayoutError: with the numbers.
    """
    spec, tp, moe = engines.spec, engines.spec.tp, config.moe
    if spec.backend != "vllm" or spec.pp != 1:
        raise LayoutError(f"{spec}: mtrl samples with vllm and without engine pipelines; write vllm:dNtM")
    if engines.expert_parallel and moe is None:
        raise LayoutError(f"{spec}: expert parallelism, but {config.family} has no experts")
    sizes = [(config.num_attention_heads, "attention heads"), (_padded(config.vocab_size), "vocabulary rows")]
    if config.num_kv_heads >= tp:
        sizes.append((config.num_kv_heads, "KV heads"))
    elif tp % config.num_kv_heads:
        raise LayoutError(f"{spec}: {config.num_kv_heads} KV heads cannot be shared evenly by t{tp}")
    if config.dense_layers:
        sizes.append((config.intermediate_size, "MLP hidden size"))
    if moe and moe.shared_hidden_size:
        sizes.append((moe.shared_hidden_size, "shared expert hidden size"))
    if moe and not engines.expert_parallel:
        sizes.append((moe.expert_hidden_size, "expert hidden size"))
    for size, what in sizes:
        if size % tp:
            raise LayoutError(f"{spec}: {what} {size} cannot be split by t{tp}")
    if moe and engines.expert_parallel and moe.num_experts < tp:
        raise LayoutError(f"{spec}: {moe.num_experts} experts are too few for expert parallelism over t{tp}")
    if config.family == "gpt_oss" and tp > 1 and not engines.expert_parallel:
        raise LayoutError(
            f"{spec}: what vLLM reads of gpt-oss experts that are sliced is not known, since its CPU build "
            "slices none that have biases; use expert parallelism"
        )


def _kind(
    weight: Weight,
    config: ModelConfig,
    layout: RankLayout,
    engines: Engines,
    stages: Stages,
    itemsize: int,
    held: Mapping[int, tuple[int, ...]] | None = None,
) -> Kind:
    extents = config.extents()
    dims = parse_pattern(weight.place.pattern)
    assert not weight.place.within, weight.place.name
    symbol = next((s for s in ROLE_SYMBOLS[weight.role] if s in SHARDED_BY and s != "e"), None)
    is_expert = "e" in ROLE_SYMBOLS[weight.role]
    num_experts = extents["e"] if is_expert else 0
    shape = tuple(math.prod(extents[each] for each in dim) for dim in dims)
    dim, inner = None, 1
    if symbol is not None:
        dim = next(index for index, each in enumerate(dims) if symbol in each)
        at = dims[dim].index(symbol)
        assert math.prod(extents[each] for each in dims[dim][:at]) == 1, weight.place.pattern
        inner = math.prod(extents[each] for each in dims[dim][at + 1 :])
    ways = layout.size("ffn.etp" if is_expert else "attn.tp")
    return Kind(
        name=weight.place.name,
        shape=shape,
        itemsize=4 if weight.dtype == "float32" else itemsize,
        dim=dim,
        expert_dim=next((index for index, each in enumerate(dims) if each == ("e",)), None),
        num_experts=num_experts,
        stages=held or _held_stages(weight, config, stages),
        trainer=_trainer_ranges(symbol, extents[symbol], inner, ways) if symbol else ((0, 1),) * ways,
        trainer_experts=_even(num_experts, layout.size("ffn.ep")) if is_expert else ((0, 0),),
        engine=_engine_ranges(weight.role, symbol, config, shape[dim], engines)
        if dim is not None
        else ((0, 1),) * engines.spec.tp,
        engine_experts=_engine_experts(weight.role, config, engines)
        if is_expert
        else ((0, 0),) * engines.spec.tp,
    )


def _held_stages(weight: Weight, config: ModelConfig, stages: Stages) -> dict[int, tuple[int, ...]]:
    if weight.layers is None:
        if weight.role == "embedding":
            return {0: (0,)}
        return {stages.pp - 1: (0,)}
    layers = set(weight.layers)
    held = {
        rank: tuple(
            layer
            for chunk in range(stages.num_chunks)
            for layer in stages.chunk_layers(rank, chunk)
            if layer in layers
        )
        for rank in range(stages.pp)
    }
    return {rank: found for rank, found in held.items() if found}


def _trainer_ranges(symbol: str, extent: int, inner: int, ways: int) -> tuple[Range, ...]:
    whole = padded_vocab_size(extent, ways) if symbol == "v" else extent
    each, edge = whole // ways * inner, extent * inner
    return tuple((min(index * each, edge), min((index + 1) * each, edge)) for index in range(ways))


def _even(extent: int, ways: int) -> tuple[Range, ...]:
    """``extent`` in ``ways`` ranges; the first ones have one more where it does not divide."""
    base, longer = divmod(extent, ways)
    starts = [index * base + min(index, longer) for index in range(ways + 1)]
    return tuple(itertools.pairwise(starts))


def _engine_ranges(
    role: Role, symbol: str | None, config: ModelConfig, extent: int, engines: Engines
) -> tuple[Range, ...]:
    tp = engines.spec.tp
    whole = role in _WHOLE.get(config.family, ()) or (symbol == "j" and engines.expert_parallel)
    if whole:
        return ((0, extent),) * tp
    if symbol == "v":
        each = _padded(extent) // tp
        return tuple((min(rank * each, extent), min((rank + 1) * each, extent)) for rank in range(tp))
    if role in _KEY_VALUE and config.num_kv_heads < tp:
        heads = _even(extent, config.num_kv_heads)
        return tuple(heads[rank * config.num_kv_heads // tp] for rank in range(tp))
    return _even(extent, tp)


def _engine_experts(role: Role, config: ModelConfig, engines: Engines) -> tuple[Range, ...]:
    assert config.moe is not None
    num_experts, tp = config.moe.num_experts, engines.spec.tp
    if not engines.expert_parallel or role in _WHOLE.get(config.family, ()):
        return ((0, num_experts),) * tp
    return _even(num_experts, tp)


def _padded(vocab_size: int) -> int:
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ---- for the plan ----

Side = Literal["attn", "ffn"]


def alike_of(kinds: Sequence[Kind], layout: RankLayout, engines: Engines) -> Iterator[Alike]:
    """All tensors, those that lie alike together."""
    holders = _holders(layout)
    everyone = [engines.ranks(rank) for rank in range(engines.spec.tp)]
    for kind in kinds:
        for layers, at in _layers_by_stages(kind):
            for experts in _expert_cells(kind):
                need: dict[Box, list[int]] = {}
                for rank, (along, held) in enumerate(zip(kind.engine, kind.engine_experts, strict=True)):
                    if along[0] < along[1] and _within(experts, held):
                        need.setdefault(kind.box(along, experts), []).extend(everyone[rank])
                have: dict[Box, list[int]] = {}
                group = next(i for i, held in enumerate(kind.trainer_experts) if _within(experts, held))
                for index, along in enumerate(kind.trainer):
                    if along[0] < along[1]:
                        ranks = (
                            holders["ffn", stage, group, index]
                            if kind.num_experts
                            else holders["attn", stage, 0, index]
                            for stage in at
                        )
                        have.setdefault(kind.box(along, experts), []).extend(
                            itertools.chain.from_iterable(ranks)
                        )
                yield Alike(
                    names=kind.names(layers, experts),
                    have={box: tuple(sorted(ranks)) for box, ranks in have.items()},
                    need={box: tuple(sorted(ranks)) for box, ranks in need.items()},
                    itemsize=kind.itemsize,
                )


def _holders(layout: RankLayout) -> dict[tuple[Side, int, int, int], Ranks]:
    """Ranks by pipeline rank, ep and etp; and by pipeline rank, 0 and tp."""
    found: dict[tuple[Side, int, int, int], list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        found.setdefault(("ffn", at.pp, at.ep, at.etp), []).append(rank)
        found.setdefault(("attn", at.pp, 0, at.tp), []).append(rank)
    return {key: tuple(ranks) for key, ranks in found.items()}


def _layers_by_stages(kind: Kind) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layers with the pipeline ranks that hold them."""
    if kind.is_per_layer:
        return [(layers, (stage,)) for stage, layers in kind.stages.items()]
    return [((0,), tuple(kind.stages))]


def _expert_cells(kind: Kind) -> list[Range]:
    """Experts that no rank of either side holds only some of."""
    edges = {edge for held in (*kind.trainer_experts, *kind.engine_experts) for edge in held}
    return list(itertools.pairwise(sorted(edges))) or [(0, 0)]


def _within(inner: Range, outer: Range) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
