"""From a spec to the picture that layout_svg draws: which lanes, bands, tooltips and legend it has."""

from mtrl.models.stages import Stages
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import ParallelSpec
from mtrl.tools.layout_facts import View, ranks_text, short
from mtrl.tools.layout_svg import COLOURS, Lane, Picture, Style

ALONE = {
    "TP": "attention is not split: each rank has whole layers",
    "EP": "experts are not spread: each rank has every expert of its layers",
}


def picture_of(view: View, num_layers: int | None = None) -> Picture:
    """What is drawn; with ``num_layers`` the bands say which layers they hold."""
    is_training = isinstance(view.spec, ParallelSpec)
    bands, names = _stage_bands(view, num_layers) if is_training else _engine_bands(view)
    lanes = _training_lanes(view) if is_training else _rollout_lanes(view)
    return Picture(
        title=view.text,
        subtitle=(view.summary, view.crossings),
        gpus_per_node=view.gpus_per_node,
        lanes=lanes,
        bands=bands,
        band_names=names,
        tooltips=_tooltips(view, bands, names),
        legend=_legend(view, lanes, names),
    )


def _stage_bands(view: View, num_layers: int | None) -> tuple[list[int], list[str]]:
    pp, world_size = view.axis("attn.pp").size, view.spec.world_size
    names = [f"stage {stage}" for stage in range(pp)]
    if num_layers is not None and num_layers >= pp:
        layers = Stages.balanced(num_layers, pp).layers
        names = [f"{name} · layers {own[0]}–{own[-1]}" for name, own in zip(names, layers, strict=True)]
    return [rank * pp // world_size for rank in range(world_size)], names


def _engine_bands(view: View) -> tuple[list[int], list[str]]:
    dp, world_size = view.axis("rollout.dp").size, view.spec.world_size
    return [rank * dp // world_size for rank in range(world_size)], [f"engine {index}" for index in range(dp)]


def _training_lanes(view: View) -> list[Lane]:
    assert isinstance(view.spec, ParallelSpec)
    layout = RankLayout.from_spec(view.spec)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    captions = [
        f"dp{place.dp} cp{place.cp}" if view.spec.attn.cp > 1 else f"dp{place.dp}" for place in places
    ]
    tp, ep, etp = view.axis("attn.tp"), view.axis("ffn.ep"), view.axis("ffn.etp")
    lanes = [
        Lane(style="soft", label="TP", groups=tp.group_numbers(), captions=captions, shows_rank=True),
        Lane(style="solid", label="EP", groups=ep.group_numbers()),
    ]
    if etp.size > 1:
        lanes.append(Lane(style="outline", label="ETP", groups=etp.group_numbers()))
    return lanes


def _rollout_lanes(view: View) -> list[Lane]:
    tp, pp = view.axis("rollout.tp"), view.axis("rollout.pp")
    lanes = [Lane(style="soft", label="TP", groups=tp.group_numbers(), shows_rank=True)]
    if pp.size > 1:
        lanes.append(Lane(style="solid", label="PP", groups=pp.group_numbers()))
    return lanes


def _legend(view: View, lanes: list[Lane], band_names: list[str]) -> list[tuple[Style, str, str]]:
    legend: list[tuple[Style, str, str]] = []
    for lane in lanes:
        size = next(axis.size for axis in view.axes if short(axis) == lane.label)
        repeats = f"; colours repeat after {COLOURS}" if view.spec.world_size // size > COLOURS else ""
        if size > 1:
            legend.append((lane.style, f"{lane.label} 0", _shared_text(view, lane.label, size) + repeats))
        else:
            legend.append((lane.style, "", ALONE[lane.label]))
    if len(band_names) > 1:
        is_training = isinstance(view.spec, ParallelSpec)
        meaning = "pipeline stages: each has its own layers" if is_training else "engines: each a whole model"
        legend.append(("band", band_names[0].split(" · ")[0], meaning))
    return legend


def _shared_text(view: View, label: str, size: int) -> str:
    if label == "EP":
        return f"experts: {size} ranks of one number have a layer's experts between them, 1/{size} each"
    if label == "ETP":
        return f"experts: {size} ranks of a block split each expert they have {size} ways"
    if label == "PP":
        return f"pipelines: {size} ranks of one number have the layers between them, in order"
    what = "every layer's attention" if isinstance(view.spec, ParallelSpec) else "every layer"
    return f"{what.rsplit(maxsplit=1)[-1]}: {size} ranks of one number split {what} {size} ways (tensor parallel)"


def _tooltips(view: View, bands: list[int], band_names: list[str]) -> list[str]:
    """One text a rank: where it is, and for every axis its place and who else is in its group."""
    texts = []
    for rank, band in enumerate(bands):
        node, gpu = divmod(rank, view.gpus_per_node)
        texts.append(f"rank {rank}: node {node}, GPU {gpu}, {band_names[band]}")
    for axis in view.axes:
        if axis.size > 1 and axis.name != "ffn.pp":
            for number, group in enumerate(axis.groups):
                for place, rank in enumerate(group):
                    where = f"{short(axis)} {number}, {place + 1} of {axis.size}: ranks {ranks_text(group)}"
                    texts[rank] += f"\n{where}"
    return texts
