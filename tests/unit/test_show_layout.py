"""What `tools/show_layout.py` prints and draws."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mtrl.parallel.errors import LayoutError, ModelError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_spec, parse_training_spec
from mtrl.tools import layout_svg
from mtrl.tools.layout_facts import View, model_shares, ranks_text, refuse_problems
from mtrl.tools.layout_picture import picture_of
from mtrl.tools.layout_svg import PER_ROW, draw
from mtrl.tools.show_layout import main

FOLDED = "megatron:(attn:d4p2t2c2|ffn:d2p2t4e2)"
SPECS = [
    (FOLDED, 8),
    ("megatron:d1", 8),
    ("megatron:(attn:d2t2p2|ffn:e4)", 8),  # two stages on one node
    ("megatron:p3d6e2", 8),  # stages that begin inside a node, and a last node that is not full
    ("megatron:(attn:t16d4|ffn:t2e16)", 4),  # groups wider than a node
    ("megatron:d8t16e64", 72),  # nodes wider than a row
    ("megatron:d16p4t8e32", 8),  # 512 ranks
    ("vllm:d2t4p2", 8),
    ("vllm:d3", 2),
]
MODEL = {
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}
SVG = "{http://www.w3.org/2000/svg}"


def draw_tree(text: str, gpus_per_node: int = 8) -> ElementTree.Element:
    return ElementTree.fromstring(draw(picture_of(View.of(text, gpus_per_node))))


def blocks(tree: ElementTree.Element, name: str) -> list[set[int]]:
    """The ranks of each block of one lane and group, in drawing order (class names are g<lane>-<group>)."""
    found = []
    for group in tree.iter(f"{SVG}g"):
        if name in group.attrib["class"].split():
            tooltips = [title.text or "" for title in group.iter(f"{SVG}title")]
            found.append({int(tooltip.split()[1].rstrip(":")) for tooltip in tooltips})
    return found


@pytest.mark.parametrize(("text", "gpus_per_node"), SPECS)
def test_every_rank_has_its_number_and_a_tooltip_in_every_lane(text: str, gpus_per_node: int) -> None:
    tree = draw_tree(text, gpus_per_node)
    world_size = parse_spec(text).world_size
    numbers = [element.text for element in tree.iter(f"{SVG}text") if (element.text or "").isdigit()]
    assert sorted(map(int, numbers)) == list(range(world_size))
    lanes = len(picture_of(View.of(text, gpus_per_node)).lanes)
    tooltips = [title.text or "" for title in tree.iter(f"{SVG}title")][1:]  # the first is the picture's own
    ranks = sorted(int(tooltip.split()[1].rstrip(":")) for tooltip in tooltips)
    assert ranks == sorted(list(range(world_size)) * lanes)


@pytest.mark.parametrize(("text", "gpus_per_node"), SPECS)
def test_nothing_is_drawn_outside_the_picture(text: str, gpus_per_node: int) -> None:
    tree = draw_tree(text, gpus_per_node)
    width, height = float(tree.attrib["width"]), float(tree.attrib["height"])
    for element in tree.iter(f"{SVG}rect"):
        left, top = float(element.get("x", 0)), float(element.get("y", 0))
        assert left >= 0 and left + float(element.attrib["width"]) <= width
        assert top >= 0 and top + float(element.attrib["height"]) <= height
    assert all(float(element.attrib["y"]) <= height for element in tree.iter(f"{SVG}text"))


@pytest.mark.parametrize(("text", "gpus_per_node"), SPECS)
def test_nodes_do_not_overlap(text: str, gpus_per_node: int) -> None:
    nodes = [
        tuple(float(element.attrib[key]) for key in ("x", "y", "width", "height"))
        for element in draw_tree(text, gpus_per_node).iter(f"{SVG}rect")
        if element.get("stroke") == layout_svg.NODE_LINE
    ]
    assert len(nodes) == View.of(text, gpus_per_node).num_nodes
    for index, (x, y, width, height) in enumerate(nodes):
        for other_x, other_y, *_ in nodes[index + 1 :]:
            assert abs(other_x - x) >= width or abs(other_y - y) >= height


def test_blocks_hold_the_ranks_of_their_group() -> None:
    tree, layout = draw_tree(FOLDED), RankLayout.from_spec(parse_training_spec(FOLDED))
    for lane, axis in enumerate(("attn.tp", "ffn.ep", "ffn.etp")):
        for number, group in enumerate(layout.groups(axis)):
            assert set().union(*blocks(tree, f"g{lane}-{number}")) == set(group)
    assert blocks(tree, "g0-1") == [{2, 3}]  # neighbours merge
    assert blocks(tree, "g1-1") == [{1}, {5}]  # ranks that lie apart do not


def test_a_group_wider_than_a_row_is_one_block_a_row() -> None:
    assert [len(block) for block in blocks(draw_tree("megatron:t24", 72), "g0-0")] == [PER_ROW] * 3


def test_lanes_that_say_nothing_are_left_out() -> None:
    def labels(text: str) -> list[str]:
        return [lane.label for lane in picture_of(View.of(text, 8)).lanes]

    assert labels("megatron:d4t2") == ["TP"]
    assert labels("megatron:d4t2e4") == ["TP", "EP"]
    assert labels("megatron:(attn:d4|ffn:t2e2)") == ["TP", "EP", "ETP"]
    assert labels("vllm:d2t2") == ["TP"]
    assert labels("vllm:d2p2") == ["TP", "PP"]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted([luminance(one), luminance(other)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_stands_out_from_every_colour() -> None:
    dark_on = (*layout_svg.SOFT, *layout_svg.BANDS, layout_svg.PLAIN, "#ffffff")
    assert min(contrast(layout_svg.INK, colour) for colour in dark_on) >= 7
    assert min(contrast(layout_svg.MUTED, colour) for colour in (*layout_svg.BANDS, "#ffffff")) >= 4.5
    assert min(contrast("#ffffff", colour) for colour in layout_svg.SOLID) >= 4.5


def test_no_text_can_break_the_drawing() -> None:
    picture = dataclasses.replace(picture_of(View.of("megatron:d2", 8)), title="<a & b>")
    title = ElementTree.fromstring(draw(picture)).find(f"{SVG}title")
    assert title is not None and title.text == "<a & b>"


def test_bands_say_which_layers_they_hold() -> None:
    assert picture_of(View.of("megatron:p4", 8), 7).band_names == [
        "stage 0 · layers 0–0",
        "stage 1 · layers 1–2",
        "stage 2 · layers 3–4",
        "stage 3 · layers 5–6",
    ]


def test_crossings_tell_what_leaves_a_node() -> None:
    assert View.of(FOLDED, 8).crossings == (
        "inside a node: TP 2, CP 2, ETP 4, EP 2 · "
        "across nodes: DP 4 (2 nodes), PP 2 (2 nodes), EDP 2 (2 nodes)"
    )
    assert View.of("megatron:d1", 8).crossings == "one rank: no communication"
    with pytest.raises(LayoutError, match="at least one GPU"):
        View.of("megatron:d1", 0)


def test_long_groups_are_shortened() -> None:
    assert ranks_text(range(8)) == "0,1,2,3,4,5,6,7"
    assert ranks_text(range(16)) == "0-15"
    assert ranks_text(range(0, 64, 4)) == "0,4,..,60"


def shares(text: str, config: dict[str, object]) -> dict[str, str]:
    return {share.what: share.per_rank for share in model_shares(parse_spec(text), config)}


def test_a_rank_s_share_of_a_model() -> None:
    assert shares(FOLDED, dict(MODEL)) == {
        "attention heads": "16",
        "KV heads": "2",
        "layers": "24",
        "experts": "64",
        "expert hidden size": "192",
        "vocabulary": "75968",
    }
    assert shares("megatron:p5", dict(MODEL))["layers"] == "9 to 10, uneven: 9 10 10 10 9"
    assert shares("megatron:t3", {**MODEL, "vocab_size": 100})["vocabulary"] == "34, padded by 2"
    assert shares("vllm:t8", dict(MODEL))["KV heads"] == "1, on 2 ranks each"
    assert shares("megatron:t2", {"text_config": MODEL})["attention heads"] == "16"


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("megatron:t8", MODEL, "4 KV heads cannot be split 8 ways by t8; sizes that fit: 1, 2, 4"),
        ("megatron:t3", MODEL, "32 attention heads cannot be split 3 ways by t3; sizes that fit: 1, 2, 4"),
        (
            "megatron:d12e12",
            MODEL,
            "128 experts cannot be split 12 ways by ffn e12; sizes that fit: 1, 2, 4, 8, 16",
        ),
        ("megatron:(attn:d5|ffn:t5)", MODEL, "768 expert hidden size cannot be split 5 ways by ffn t5"),
        ("megatron:p49", MODEL, "48 layers cannot fill 49 pipeline stages"),
        ("megatron:d2e2", {**MODEL, "num_experts": None}, "the model has none"),
        ("vllm:t3", MODEL, "4 KV heads cannot be split 3 ways"),
    ],
)
def test_what_a_model_does_not_allow_is_a_layout_error(
    text: str, config: dict[str, object], message: str
) -> None:
    spec = parse_spec(text)
    with pytest.raises(LayoutError) as caught:
        refuse_problems(spec, model_shares(spec, config))
    assert message in str(caught.value) and str(caught.value).startswith(f"{text}: ")


@pytest.mark.parametrize("value", [None, 0, -1, "8", True, 1.5])
def test_a_config_without_a_usable_number_is_a_model_error(value: object) -> None:
    with pytest.raises(ModelError, match="num_attention_heads is"):
        model_shares(parse_spec("megatron:d1"), {**MODEL, "num_attention_heads": value})


def test_the_tables_list_groups_places_and_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    svg = tmp_path / "layout.svg"
    assert main(["megatron:(attn:d2t2|ffn:e4)", "--model", str(tmp_path), "--svg", str(svg)]) == 0
    printed = capsys.readouterr().out
    assert "the same as megatron:d2t2e4" in printed
    assert re.search(r"attn\.tp +│ +2 │ +2 │ +1 │ 0,1  2,3 ", printed)
    assert re.search(r"ffn\.ep +│ +4 │ +1 │ +1 │ 0,1,2,3 ", printed)
    assert re.search(r"│ +3 │ +0 │ +3 │ +0 │ +1 │ +0 │ +1 │ +0 │ +3 │ +0 │", printed)  # place of rank 3
    assert re.search(r"experts +│ +128 │ +32 │", printed)
    assert ElementTree.parse(svg).getroot().tag == f"{SVG}svg"


def test_large_worlds_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["megatron:d64t8e64"]) == 0
    printed = capsys.readouterr().out
    assert "and 56 more" in printed and "place of each rank" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["megatron:d2e4"], "SpecError: the world d2*p1*t1*c1 = 2 is not divisible"),
        (["megatron:d2", "--model", "nowhere"], "ModelError: no config.json at nowhere"),
        (["megatron:d2", "--svg", "nowhere/at/all.svg"], "FileNotFoundError"),
        (["megatron:d8192", "--svg", "large.svg"], "LayoutError: 8192 ranks are too many to draw"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_it_runs_from_a_checkout_that_is_not_installed_and_loads_no_torch(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "show_layout.py"
    run = (
        "import runpy, sys; sys.argv = [sys.argv[1], 'megatron:d2']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: sys.exit(done.code or ('torch' in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", run, str(script)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    result = subprocess.run(
        [sys.executable, str(script), "megatron:x2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and result.stderr.endswith("megatron:x2\n           ^\n")
