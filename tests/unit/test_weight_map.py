"""From a weight table to each rank's pieces, and the sizes that an axis must divide."""

from pathlib import Path

import pytest

from mtrl.models.backends.torch_native.places import places
from mtrl.models.boxes import Box, Padding, View
from mtrl.models.families import load_model_config
from mtrl.models.pieces import check_coverage
from mtrl.models.stages import Stages
from mtrl.models.weight_map import (
    RankWeights,
    WeightMap,
    check_model_fits,
    owned_boxes,
    padded_vocab_size,
)
from mtrl.parallel.errors import LayoutError, WeightError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from tests.toys import SMALL, build_toy, empty_tensors, tiny_config, write_folder

pytestmark = pytest.mark.one_stack


def weight_map(spec: str, *, tied: bool = False, num_layers: int = 4, vocab_size: int = 10) -> WeightMap:
    layout = RankLayout.from_spec(parse_training_spec(spec))
    config = tiny_config(vocab_size=vocab_size, num_layers=num_layers, tied=tied, dense_layers=[])
    stages = Stages.balanced(num_layers, layout.spec.attn.pp)
    return WeightMap(config=config, layout=layout, stages=stages, places=places(config))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("megatron:t8", "KV heads 4 cannot be split attn t8 ways; use 1, 2, 4"),
        ("megatron:t3", "attention heads 8 cannot be split attn t3 ways; use 1, 2, 4"),
        ("megatron:e16d16", "experts 8 cannot be split ffn e16 ways; use 1, 2, 4, 8"),
        ("megatron:(attn:d3|ffn:e3)", "experts 8 cannot be split ffn e3 ways; use 1, 2, 4"),
        ("megatron:(attn:d16|ffn:t16)", "expert hidden size 40 cannot be split ffn t16 ways; use 1, 2, 4, 5"),
    ],
)
def test_a_size_that_an_axis_does_not_divide_is_refused_with_those_that_fit(
    tmp_path: Path, spec: str, message: str
) -> None:
    config = load_model_config(write_folder(build_toy("moe", seed=1, **SMALL), tmp_path))
    with pytest.raises(LayoutError) as raised:
        check_model_fits(config, parse_training_spec(spec))
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{parse_training_spec(spec)}: ")


def test_a_dense_model_is_refused_an_mlp_it_cannot_split_and_any_expert_axis(tmp_path: Path) -> None:
    sizes = SMALL | {"intermediate_size": 74}
    config = load_model_config(write_folder(build_toy("dense", seed=1, **sizes), tmp_path))
    with pytest.raises(LayoutError, match="MLP hidden size 74 cannot be split attn t4 ways; use 1, 2"):
        check_model_fits(config, parse_training_spec("megatron:t4"))
    with pytest.raises(LayoutError, match="e2 asks for expert parallelism, but qwen3 has no experts"):
        check_model_fits(config, parse_training_spec("megatron:(attn:d2|ffn:e2)"))


def test_an_mlp_size_of_a_model_without_dense_layers_does_not_matter(tmp_path: Path) -> None:
    sizes = SMALL | {"intermediate_size": 77}
    config = load_model_config(write_folder(build_toy("moe", seed=1, **sizes), tmp_path))
    check_model_fits(config, parse_training_spec("megatron:t4"))


@pytest.mark.parametrize(("vocab_size", "tp", "padded"), [(8, 4, 8), (9, 4, 12), (1, 8, 8), (101, 1, 101)])
def test_the_vocabulary_is_padded_to_equal_shares(vocab_size: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tp) == padded


def test_a_rank_whose_share_of_the_vocabulary_is_all_padding_has_no_piece_of_it() -> None:
    weights = weight_map("megatron:t8", vocab_size=5).of_rank(7)
    assert not [piece for piece in weights.pieces if "embedding" in piece.local.name]
    (padding, output) = weights.paddings
    assert padding.local_box == Box(((0, 1), (0, 3))) and output.local.name == "output_layer.weight"


def test_tied_embeddings_are_one_tensor_held_at_both_ends_of_a_pipeline() -> None:
    one, two = weight_map("megatron:d1", tied=True), weight_map("megatron:p2", tied=True)
    assert "lm_head.weight" not in one.hf_shapes()
    name = "model.embed_tokens.weight"
    assert [piece.local.name for piece in one.of_rank(0).pieces if piece.hf.name == name] == [
        "embedding.word_embeddings.weight"
    ]
    held = [[piece.local.name for piece in two.of_rank(r).pieces if piece.hf.name == name] for r in (0, 1)]
    assert held == [["embedding.word_embeddings.weight"], ["output_layer.weight"]]
    assert owned_boxes(two.of_rank(0).pieces)[name] == owned_boxes(two.of_rank(1).pieces)[name]


def test_each_rank_holds_its_own_experts_of_its_own_layers() -> None:
    found = weight_map("megatron:(attn:p2t2|ffn:e2)")
    for rank in range(4):
        at = found.layout.coordinates(rank)
        ups = {
            piece.hf.name for piece in found.of_rank(rank).pieces if piece.hf.name.endswith("up_proj.weight")
        }
        layers, experts = range(2 * at.pp, 2 * at.pp + 2), range(4 * at.ep, 4 * at.ep + 4)
        assert ups == {f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n in layers for e in experts}


def test_what_the_table_and_the_parameters_do_not_share_is_an_error() -> None:
    weights = weight_map("megatron:d1").of_rank(0)
    tensors = empty_tensors(weights)
    check_coverage(tensors, weights)
    with pytest.raises(WeightError, match=r"no row of the weight table fills extra\.bias"):
        check_coverage(tensors | {(0, "extra.bias"): tensors[0, "output_layer.weight"]}, weights)
    without = {key: tensor for key, tensor in tensors.items() if key[1] != "output_layer.weight"}
    with pytest.raises(WeightError, match=r"names output_layer\.weight, which this model does not have"):
        check_coverage(without, weights)
    wrong = tensors | {(0, "output_layer.weight"): tensors[0, "output_layer.weight"][:-1]}
    with pytest.raises(
        WeightError, match=r"output_layer\.weight is \(9, 3\), the weight table says \(10, 3\)"
    ):
        check_coverage(wrong, weights)


def test_an_element_filled_twice_or_never_is_an_error() -> None:
    weights = weight_map("megatron:d1").of_rank(0)
    tensors = empty_tensors(weights)
    norm = next(piece for piece in weights.pieces if piece.local.name == "decoder.final_layernorm.weight")
    twice = RankWeights(pieces=(*weights.pieces, norm), paddings=())
    with pytest.raises(WeightError, match=r"decoder\.final_layernorm\.weight: pieces cover 6 of 3 elements"):
        check_coverage(tensors, twice)
    view = View(name=norm.local.name, shape=(3,), factors=((3,),), order=(0,))
    part = Padding(local=view, local_box=Box(((0, 2),)))
    others = tuple(piece for piece in weights.pieces if piece is not norm)
    with pytest.raises(WeightError, match=r"decoder\.final_layernorm\.weight: pieces cover 2 of 3 elements"):
        check_coverage(tensors, RankWeights(pieces=others, paddings=(part,)))
    # As many elements as there are, but one of them twice.
    overlapping = (part, Padding(local=view, local_box=Box(((0, 1),))))
    with pytest.raises(WeightError, match="final_layernorm"):
        check_coverage(tensors, RankWeights(pieces=others, paddings=overlapping))
