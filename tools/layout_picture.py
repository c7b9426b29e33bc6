"""From a spec to the picture that layout_svg draws: which lanes, bands, tooltips and legend it has."""

from mtrl.models.stages import Stages
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import ParallelSpec
from mtrl.tools.layout_facts import View, ranks_text, short
from mtrl.tools.layout_svg import COLOURS, Lane, Picture, Style


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
    tp = view.axis("attn.tp").group_numbers()
    lanes = [Lane(style="soft", label="TP", groups=tp, captions=captions, shows_rank=True)]
    ep, etp = view.axis("ffn.ep"), view.axis("ffn.etp")
    if ep.size > 1:
        lanes.append(Lane(style="solid", label="EP", groups=ep.group_numbers()))
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
    is_training = isinstance(view.spec, ParallelSpec)
    what = "layer's attention" if is_training else "layer"
    legend: list[tuple[Style, str, str]] = []
    for lane in lanes:
        size = next(axis.size for axis in view.axes if short(axis) == lane.label)
        meaning = {
            "TP": f"the {size} ranks of a TP number split each {what} {size} ways (tensor parallel)",
            "EP": f"the {size} ranks of an EP number share out a layer's experts (expert parallel)",
            "ETP": f"the {size} ranks of an ETP number split each of their experts {size} ways",
            "PP": f"the {size} ranks of a PP number share out the layers (pipeline parallel)",
        }[lane.label]
        repeats = f"; colours repeat after {COLOURS}" if view.spec.world_size // size > COLOURS else ""
        if size == 1:
            legend.append((lane.style, "", f"a rank; no {what} is split between ranks"))
        else:
            legend.append((lane.style, f"{lane.label} 0", meaning + repeats))
    if len(band_names) > 1:
        meaning = (
            "a pipeline stage, with layers of its own" if is_training else "an engine, with a whole model"
        )
        legend.append(("band", band_names[0].split(" · ", maxsplit=1)[0], meaning))
    return legend


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
