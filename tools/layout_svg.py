"""Draw ranks on nodes as an SVG: lanes of group blocks inside node boxes inside pipeline bands.

Knows shapes, not parallelism: `show_layout` says what the lanes, bands and labels are. Every group is told by
its label as well as by its colour, so that the picture also works in print and for colour-blind readers. In a
browser, hovering a block dims all other groups of its lane, and every rank has a tooltip.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal
from xml.sax.saxutils import escape

Style = Literal["soft", "solid", "outline", "band"]

MARGIN, PAD, GAP = 24, 10, 4
BAND_TITLE = 26
ASPECT = 2.0  # width to height aimed at
PER_ROW = 8  # ranks side by side in a node
COMPACT_ABOVE = 128  # ranks; above this tiles shrink and lose their captions
INK, MUTED, LINE = "#1b2530", "#51606e", "#b8c2cc"
NODE_LINE, BANDS = "#8a97a3", ("#f1f4f7", "#e3e9ef")
# Dark ink on each of SOFT, and white on each of SOLID, has a contrast of at least 4.5.
SOFT = ("#b9dcf5", "#ffdca8", "#bde5cf", "#f3cde1", "#f4e88f", "#d3d1f3", "#f8c9b9", "#c9dfe0")
SOLID = ("#0b5a8f", "#8a4b00", "#00694b", "#8e2e6b", "#5c5200", "#4b3fa0", "#a3261e", "#37474f")
COLOURS = len(SOFT)
PLAIN = "#fafbfc"  # of a rank that shares with nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One strip of blocks over the ranks: ranks of the same group side by side merge into one block.

    ``groups`` has one group number a rank, None where the rank shares with nobody; ``captions`` a small text
    a rank, or nothing.
    """

    style: Style
    label: str
    groups: Sequence[int | None]
    captions: Sequence[str] = ()
    shows_rank: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that is drawn. ``bands`` gives each rank's band, in ascending order along the ranks."""

    title: str
    subtitle: Sequence[str]
    gpus_per_node: int
    lanes: Sequence[Lane]
    bands: Sequence[int]
    band_names: Sequence[str]
    tooltips: Sequence[str]
    legend: Sequence[tuple[Style, str, str]]  # swatch (plain without label), label, meaning

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.bands)

    @property
    def nodes(self) -> list[range]:
        """The ranks of every node."""
        starts = range(0, self.world_size, self.gpus_per_node)
        return [range(start, min(start + self.gpus_per_node, self.world_size)) for start in starts]

    @property
    def bands_hold_whole_nodes(self) -> bool:
        """Whether no node is split between bands: bands are then drawn around nodes, else inside them."""
        return all(len({self.bands[rank] for rank in node}) == 1 for node in self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Pixels of everything that is the same for all nodes."""

    tile: int
    lanes: tuple[int, ...]
    band_header: int  # above a row of ranks, where bands lie inside nodes
    per_row: int
    rows: int

    @classmethod
    def of(cls, picture: Picture) -> "_Sizes":
        is_compact = picture.world_size > COMPACT_ABOVE
        ranks = min(picture.gpus_per_node, picture.world_size)
        per_row = min(ranks, PER_ROW)
        lanes = tuple((36 if is_compact else 52) if lane.shows_rank else 20 for lane in picture.lanes)
        inside = len(picture.band_names) > 1 and not picture.bands_hold_whole_nodes
        return cls(
            tile=46 if is_compact else 66,
            lanes=lanes,
            band_header=20 if inside else 0,
            per_row=per_row,
            rows=math.ceil(ranks / per_row),
        )

    @property
    def row(self) -> int:
        return self.band_header + sum(self.lanes) + GAP * (len(self.lanes) - 1) + PAD

    @property
    def node_width(self) -> int:
        return self.per_row * self.tile + 2 * PAD

    @property
    def node_height(self) -> int:
        return 24 + self.rows * self.row


class _Canvas:
    """SVG elements in drawing order, and how far they reach."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.width = self.height = 0.0

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        stroke: str = "none",
        radius: float = 6,
    ) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )
        self.width, self.height = max(self.width, x + width), max(self.height, y + height)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        fill: str = INK,
        anchor: str = "start",
        weight: int = 400,
    ) -> None:
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="{fill}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )
        if anchor == "start":  # 0.6 em a character holds for the usual sans-serif fonts
            self.width = max(self.width, x + 0.6 * size * len(text))
        self.height = max(self.height, y + size / 3)

    def tooltip(self, x: float, y: float, width: float, height: float, text: str) -> None:
        """An invisible rectangle that shows a text while the mouse is over it."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill-opacity="0">'
            f"<title>{escape(text)}</title></rect>"
        )


def draw(picture: Picture) -> str:
    """The SVG document."""
    canvas, sizes = _Canvas(), _Sizes.of(picture)
    top = _draw_header(canvas, picture)
    if picture.bands_hold_whole_nodes and len(picture.band_names) > 1:
        _draw_bands_of_nodes(canvas, picture, sizes, top)
    else:
        _draw_grid(canvas, picture, sizes, picture.nodes, MARGIN, top, _columns(sizes, len(picture.nodes), 1))
    return _document(canvas, picture)


def _document(canvas: _Canvas, picture: Picture) -> str:
    width, height = math.ceil(canvas.width + MARGIN), math.ceil(canvas.height + MARGIN)
    rules = [
        f"svg:has(.{_key(index, group)}:hover) .l{index}:not(.{_key(index, group)}){{opacity:.2}}"
        for index, lane in enumerate(picture.lanes)
        for group in sorted({group for group in lane.groups if group is not None})
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="system-ui, Helvetica, Arial, sans-serif">',
            f"<title>{escape(picture.title)}</title>",
            f"<desc>{escape('. '.join(picture.subtitle))}</desc>",
            f"<style>{''.join(rules)}</style>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *canvas.elements,
            "</svg>\n",
        ]
    )


def _draw_header(canvas: _Canvas, picture: Picture) -> float:
    """Title and legend; returns where the nodes begin."""
    canvas.text(MARGIN, 40, picture.title, size=20, weight=700)
    y = 62.0
    for line in picture.subtitle:
        canvas.text(MARGIN, y, line, size=13, fill=MUTED)
        y += 20
    for style, label, meaning in picture.legend:
        _draw_block(canvas, style, 0 if label else None, MARGIN, y, 64, 20)
        colour = "#ffffff" if style == "solid" else INK
        canvas.text(MARGIN + 32, y + 14, label, size=11, weight=600, fill=colour, anchor="middle")
        canvas.text(MARGIN + 76, y + 14, meaning, size=12)
        y += 26
    return y + 10


def _draw_bands_of_nodes(canvas: _Canvas, picture: Picture, sizes: _Sizes, top: float) -> None:
    bands = [list(nodes) for _, nodes in groupby(picture.nodes, key=lambda node: picture.bands[node[0]])]
    columns = _columns(sizes, max(len(nodes) for nodes in bands), len(bands))
    across = max(1, _columns(sizes, len(bands), 1)) if len(bands[0]) == 1 else 1
    for index, nodes in enumerate(bands):
        rows = math.ceil(len(nodes) / columns)
        width = min(columns, len(nodes)) * (sizes.node_width + PAD) + PAD
        height = BAND_TITLE + rows * (sizes.node_height + PAD)
        x = MARGIN + index % across * (width + PAD)
        y = top + index // across * (height + PAD)
        canvas.rect(x, y, width, height, fill=_band_fill(index), stroke=LINE, radius=12)
        canvas.text(x + PAD + 2, y + 18, picture.band_names[index], size=13, weight=700)
        _draw_grid(canvas, picture, sizes, nodes, x + PAD, y + BAND_TITLE, columns)


def _columns(sizes: _Sizes, num_nodes: int, num_stacks: int) -> int:
    """Nodes side by side so that ``num_stacks`` such grids, one below the other, look best on a screen."""

    def distance(columns: int) -> float:
        rows = math.ceil(num_nodes / columns)
        width = columns * (sizes.node_width + PAD)
        height = num_stacks * (rows * (sizes.node_height + PAD) + BAND_TITLE)
        shape = abs(math.log(width / height / ASPECT))
        return shape + (rows * columns - num_nodes) / num_nodes

    return min(range(1, num_nodes + 1), key=distance)


def _draw_grid(
    canvas: _Canvas, picture: Picture, sizes: _Sizes, nodes: Sequence[range], x: float, y: float, columns: int
) -> None:
    for index, node in enumerate(nodes):
        row, column = divmod(index, columns)
        left, top = x + column * (sizes.node_width + PAD), y + row * (sizes.node_height + PAD)
        canvas.rect(
            left, top, sizes.node_width, sizes.node_height, fill="#ffffff", stroke=NODE_LINE, radius=9
        )
        number = node.start // picture.gpus_per_node
        canvas.text(left + PAD + 2, top + 17, f"node {number}", size=12, weight=600, fill=MUTED)
        for line, start in enumerate(range(node.start, node.stop, sizes.per_row)):
            ranks = range(start, min(start + sizes.per_row, node.stop))
            _draw_row(canvas, picture, sizes, ranks, left + PAD, top + 24 + line * sizes.row)


def _draw_row(canvas: _Canvas, picture: Picture, sizes: _Sizes, ranks: range, x: float, y: float) -> None:
    """Neighbouring ranks of a node, one lane below the other."""
    inset = GAP / 2
    if sizes.band_header:
        _draw_bands_in_row(canvas, picture, sizes, ranks, x, y)
        inset = GAP
    y += sizes.band_header
    for index, (lane, height) in enumerate(zip(picture.lanes, sizes.lanes, strict=True)):
        for start, stop in _runs(ranks, lane.groups):
            group = lane.groups[ranks[start]]
            key = f" {_key(index, group)}" if group is not None else ""
            canvas.elements.append(f'<g class="l{index}{key}">')
            left, width = x + start * sizes.tile + inset, (stop - start) * sizes.tile - 2 * inset
            _draw_block(canvas, lane.style, group, left, y, width, height)
            _draw_lane_text(canvas, lane, group, ranks[start:stop], left, y, width, height)
            for place in range(start, stop):
                canvas.tooltip(x + place * sizes.tile, y, sizes.tile, height, picture.tooltips[ranks[place]])
            canvas.elements.append("</g>")
        y += height + GAP


def _draw_bands_in_row(
    canvas: _Canvas, picture: Picture, sizes: _Sizes, ranks: range, x: float, y: float
) -> None:
    for start, stop in _runs(ranks, picture.bands):
        band = picture.bands[ranks[start]]
        left, width = x + start * sizes.tile, (stop - start) * sizes.tile
        canvas.rect(left + 1, y, width - 2, sizes.row - 3, fill=_band_fill(band), stroke=LINE, radius=7)
        name = picture.band_names[band]
        if 7 * len(name) > width:  # the part before the dot is its number alone
            name = name.split(" · ", maxsplit=1)[0]
        size = min(11, width / len(name) / 0.62)
        canvas.text(left + 7, y + 14, name, size=size, weight=600, fill=MUTED)


def _draw_lane_text(
    canvas: _Canvas,
    lane: Lane,
    group: int | None,
    ranks: range,
    x: float,
    y: float,
    width: float,
    height: float,
) -> None:
    """The group's label once a block; in the lane that shows them, each rank's number and caption."""
    colour = "#ffffff" if lane.style == "solid" else INK
    label = "" if group is None else f"{lane.label} {group}"
    if not lane.shows_rank:
        canvas.text(
            x + width / 2, y + height / 2 + 4, label, size=11, weight=600, fill=colour, anchor="middle"
        )
        return
    is_compact = height < 40
    canvas.text(x + width / 2, y + 11, label, size=9 if is_compact else 10, fill=colour, anchor="middle")
    tile = width / len(ranks)
    for place, rank in enumerate(ranks):
        middle = x + (place + 0.5) * tile
        if place:
            left = x + place * tile
            canvas.rect(left - 0.5, y + 16, 1, height - 20, fill="#ffffff", radius=0)
        canvas.text(
            middle,
            y + (28 if is_compact else 31),
            str(rank),
            size=14 if is_compact else 18,
            weight=700,
            anchor="middle",
        )
        if lane.captions and not is_compact:
            canvas.text(middle, y + 45, lane.captions[rank], size=9.5, anchor="middle")


def _draw_block(
    canvas: _Canvas, style: Style, group: int | None, x: float, y: float, width: float, height: float
) -> None:
    if style == "band":
        canvas.rect(x, y, width, height, fill=_band_fill(group or 0), stroke=LINE)
    elif group is None:
        canvas.rect(x, y, width, height, fill=PLAIN, stroke=LINE)
    elif style == "outline":
        canvas.rect(x, y, width, height, fill="#ffffff", stroke=SOLID[group % COLOURS])
    else:
        palette = SOFT if style == "soft" else SOLID
        canvas.rect(x, y, width, height, fill=palette[group % COLOURS])


def _band_fill(band: int) -> str:
    return BANDS[band % 2]


def _key(lane: int, group: int | None) -> str:
    return f"g{lane}-{group}"


def _runs(ranks: range, keys: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """(start, stop) in places of each run of neighbours with one key; None never merges."""
    start = 0
    for place in range(1, len(ranks) + 1):
        key = keys[ranks[start]]
        if place == len(ranks) or key is None or keys[ranks[place]] != key:
            yield start, place
            start = place
