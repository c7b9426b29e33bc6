"""What `show_layout` says of a spec: its axes, the nodes their groups touch, a rank's share of a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtrl.models.stages import Stages
from mtrl.parallel.errors import LayoutError, ModelError
from mtrl.parallel.layout import ATTN_AXES, FFN_AXES, ROLLOUT_AXES, Groups, RankLayout, RolloutLayout
from mtrl.parallel.spec import ParallelSpec, RolloutSpec, parse_spec

MEANINGS = {
    "attn.tp": "splits each attention layer",
    "attn.cp": "splits each sequence",
    "attn.dp": "copies, each with its own samples",
    "attn.pp": "splits the layers into stages",
    "ffn.etp": "splits each expert",
    "ffn.ep": "spreads the experts",
    "ffn.edp": "copies of the same experts",
    "ffn.pp": "splits the layers into stages",
    "rollout.tp": "splits each layer",
    "rollout.pp": "splits the layers into stages",
    "rollout.dp": "engines, each with its own prompts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of a layout with its groups."""

    name: str
    groups: Groups

    @property
    def size(self) -> int:
        """Ranks in each group."""
        return len(self.groups[0])

    def num_nodes(self, gpus_per_node: int) -> int:
        """Nodes that the widest group touches."""
        return max(len({rank // gpus_per_node for rank in group}) for group in self.groups)

    def group_numbers(self) -> list[int | None]:
        """Each rank's group; None for all where the axis has one rank a group."""
        numbers: list[int | None] = [None] * sum(len(group) for group in self.groups)
        for index, group in enumerate(self.groups if self.size > 1 else ()):
            for rank in group:
                numbers[rank] = index
        return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A spec, as typed and parsed, with everything known about where its ranks lie."""

    text: str
    spec: ParallelSpec | RolloutSpec
    axes: tuple[Axis, ...]
    gpus_per_node: int

    @classmethod
    def of(cls, text: str, gpus_per_node: int) -> "View":
        """Of an allocation string; raises `SpecError` or `LayoutError`."""
        if gpus_per_node < 1:
            raise LayoutError(f"--gpus-per-node {gpus_per_node}: a node has at least one GPU")
        spec = parse_spec(text)
        axes: tuple[Axis, ...]
        if isinstance(spec, ParallelSpec):
            layout = RankLayout.from_spec(spec)
            axes = tuple(Axis(name=name, groups=layout.groups(name)) for name in ATTN_AXES + FFN_AXES)
        else:
            rollout = RolloutLayout.from_spec(spec)
            axes = tuple(Axis(name=name, groups=rollout.groups(name)) for name in ROLLOUT_AXES)
        return cls(text=text.strip(), spec=spec, axes=axes, gpus_per_node=gpus_per_node)

    def axis(self, name: str) -> Axis:
        """The axis of this name."""
        return next(axis for axis in self.axes if axis.name == name)

    @property
    def num_nodes(self) -> int:
        """Nodes needed, the last one perhaps not full."""
        return math.ceil(self.spec.world_size / self.gpus_per_node)

    @property
    def summary(self) -> str:
        """World, nodes and the sizes of all axes in one line."""
        nodes = f"{_count(self.num_nodes, 'node')} of {self.gpus_per_node}"
        world = f"{_count(self.spec.world_size, 'rank')} on {nodes}"
        if isinstance(self.spec, RolloutSpec):
            return f"{world} · {_count(self.spec.dp, 'engine')} of tp {self.spec.tp}, pp {self.spec.pp}"
        attn, ffn = self.spec.attn, self.spec.ffn
        attn_text = f"attention: dp {attn.dp}, pp {attn.pp}, tp {attn.tp}, cp {attn.cp}"
        return f"{world} · {attn_text} · experts: edp {ffn.edp}, pp {ffn.pp}, etp {ffn.etp}, ep {ffn.ep}"

    @property
    def crossings(self) -> str:
        """Which axes talk inside a node and which across nodes."""
        spread = [axis for axis in self.axes if axis.size > 1 and axis.name != "ffn.pp"]
        nodes = {axis.name: axis.num_nodes(self.gpus_per_node) for axis in spread}
        inside = [f"{short(axis)} {axis.size}" for axis in spread if nodes[axis.name] == 1]
        across = [
            f"{short(axis)} {axis.size} ({nodes[axis.name]} nodes)" for axis in spread if nodes[axis.name] > 1
        ]
        parts = [("inside a node: ", inside), ("across nodes: ", across)]
        return (
            " · ".join(lead + ", ".join(names) for lead, names in parts if names)
            or "one rank: no communication"
        )


def short(axis: Axis) -> str:
    """``attn.tp`` as TP."""
    return axis.name.split(".")[1].upper()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ranks_text(ranks: Sequence[int]) -> str:
    """``0,1,2,3``; from nine ranks on ``0-15`` or ``0,4,..,60``: a group of one axis is evenly spaced."""
    if len(ranks) <= 8:
        return ",".join(map(str, ranks))
    step = ranks[1] - ranks[0]
    return f"{ranks[0]}-{ranks[-1]}" if step == 1 else f"{ranks[0]},{ranks[1]},..,{ranks[-1]}"


# ---- a model's share ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank holds of one thing of the model; ``problem`` says why it cannot be shared out."""

    what: str
    total: int
    per_rank: str
    problem: str = ""


def model_shares(spec: ParallelSpec | RolloutSpec, hf_config: Mapping[str, Any]) -> list[Share]:
    """How a Hugging Face config divides over the spec's axes; raises `ModelError` for a missing key."""
    config = hf_config.get("text_config", hf_config)
    is_rollout = isinstance(spec, RolloutSpec)
    tp, pp = (spec.tp, spec.pp) if isinstance(spec, RolloutSpec) else (spec.attn.tp, spec.attn.pp)
    heads = _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads", default=heads)
    shares = [_divided("attention heads", heads, tp, "t")]
    if is_rollout and kv_heads < tp and tp % kv_heads == 0:
        shares.append(Share(what="KV heads", total=kv_heads, per_rank=f"1, on {tp // kv_heads} ranks each"))
    else:
        shares.append(_divided("KV heads", kv_heads, tp, "t"))
    shares.append(_layers(_number(config, "num_hidden_layers"), pp))
    shares += _expert_shares(spec, config)
    vocab_size = _number(config, "vocab_size")
    padding = f", padded by {-vocab_size % tp}" if vocab_size % tp else ""
    shares.append(
        Share(what="vocabulary", total=vocab_size, per_rank=f"{math.ceil(vocab_size / tp)}{padding}")
    )
    return shares


def refuse_problems(spec: ParallelSpec | RolloutSpec, shares: Sequence[Share]) -> None:
    """Raise `LayoutError` with every share that does not divide."""
    problems = [share.problem for share in shares if share.problem]
    if problems:
        raise LayoutError("\n".join(f"{spec}: {problem}" for problem in problems))


def _expert_shares(spec: ParallelSpec | RolloutSpec, config: Mapping[str, Any]) -> list[Share]:
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = next((_number(config, key) for key in keys if config.get(key)), 0)
    if isinstance(spec, RolloutSpec):
        hidden = (
            f"all, 1/{spec.tp} of each; with rollout.expert_parallel {num_experts / spec.tp:g} whole ones"
        )
        return [Share(what="experts", total=num_experts, per_rank=hidden)] if num_experts else []
    ep, etp = spec.ffn.ep, spec.ffn.etp
    if not num_experts:
        problem = f"ffn e{ep} spreads experts, but the model has none" if ep > 1 else ""
        return [Share(what="experts", total=0, per_rank="none", problem=problem)]
    key = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    hidden_size = _number(config, key)
    return [
        _divided("experts", num_experts, ep, "ffn e"),
        _divided("expert hidden size", hidden_size, etp, "ffn t"),
    ]


def _layers(num_layers: int, pp: int) -> Share:
    try:
        stages = Stages.balanced(num_layers, pp).layers
    except LayoutError as error:
        return Share(what="layers", total=num_layers, per_rank="-", problem=str(error))
    sizes = [len(stage) for stage in stages]
    uneven = "" if min(sizes) == max(sizes) else f" to {max(sizes)}, uneven: {' '.join(map(str, sizes))}"
    return Share(what="layers", total=num_layers, per_rank=f"{min(sizes)}{uneven}")


def _divided(what: str, total: int, ways: int, axis: str) -> Share:
    if total % ways == 0:
        return Share(what=what, total=total, per_rank=str(total // ways))
    fits = [str(size) for size in range(1, total + 1) if total % size == 0 and size <= 2 * ways]
    problem = f"{total} {what} cannot be split {ways} ways by {axis}{ways}; sizes that fit: {', '.join(fits)}"
    return Share(what=what, total=total, per_rank="-", problem=problem)


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}, a whole number from 1 is needed")
    return value
