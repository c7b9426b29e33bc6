"""Megatron's own models save what is read here, and load what is written here, bit by bit, on any layout.

Megatron's GPTModel is built with its own local modules (SequentialMLP experts). Its parameters are filled,
and compared, rank by rank, without its checkpoint code or the code under test.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtrl.checkpoint.megatron_weights import TorchDistSource
from mtrl.checkpoint.megatron_write import write_torch_dist
from mtrl.models.boxes import Box
from mtrl.models.families import load_model_config
from mtrl.models.sources import SafetensorsSource
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import FAMILY_TOYS, build_family_toy, save

# A layout and the families on it. Two layers are stacked into one tensor only where all layers are alike.
LAYOUTS: dict[tuple[int, str], tuple[str, ...]] = {
    (1, "megatron:d1"): tuple(toy for toy in FAMILY_TOYS if toy != "olmoe"),
    (4, "megatron:p2t2"): ("llama", "qwen2 tied"),
    (4, "megatron:(attn:d2t2|ffn:e2)"): ("mixtral", "glm4 moe", "gpt oss"),
    (4, "megatron:(attn:p2t2|ffn:e2)"): ("qwen2 moe", "qwen3 moe"),
    # Megatron's own latent attention splits its down projections over tp, which the weight map does not.
    (4, "megatron:(attn:d2p2|ffn:e2)"): ("deepseek v3",),
}
CASES = [(size, spec, toy) for (size, spec), toys in LAYOUTS.items() for toy in toys]
MIXED = ("qwen2 moe", "glm4 moe", "deepseek v3", "moonlight")
FORMS: dict[str, dict[str, bool]] = {
    "separate": {"non_homogeneous_layers": True},
    "stacked": {},
    "singletons": {"singleton_local_shards": True},
}


def name_of(spec: str, toy: str, form: str = "") -> str:
    """A case's name, which is a folder's too."""
    return " ".join((toy, *spec.removeprefix("megatron:").replace("|", " ").replace(":", " ").split(), form))


def forms_of(toy: str, forms: tuple[str, ...]) -> list[str]:
    return [form for form in forms if form != "stacked" or toy not in MIXED]


def saved_forms(size: int, toy: str) -> list[str]:
    """The forms in which Megatron saves a toy; alone, singletons of a dense and of an expert one only."""
    alone = ("separate", "stacked")
    return forms_of(toy, alone if size == 1 and toy not in ("llama", "qwen3 moe") else tuple(FORMS))


def build(groups: Any, path: Path, *, stacked: bool) -> Any:
    """On a rank: Megatron's own model of a folder, and where its parameters are, as a `Model`."""
    from mtrl.models.backends.torch_native.places import places
    from mtrl.models.boxes import Place
    from mtrl.models.builder import Model
    from mtrl.models.megatron_config import to_transformer_config
    from mtrl.models.stages import Stages
    from mtrl.models.weight_map import WeightMap

    config, spec = load_model_config(path), groups.layout.spec
    stages = Stages.balanced(config.num_layers, spec.attn.pp, 1)
    fields: dict[str, Any] = {"softmax_type": "learnable"} if config.sinks else {}
    if stacked and config.moe:
        fields["moe_layer_freq"] = 1
    megatron = to_transformer_config(config, groups, stages, **{"sequence_parallel": False, **fields})
    experts = "decoder.layers.{layer}.mlp.experts.local_experts.{expert}."
    fc1, fc2 = experts + "linear_fc1.", experts + "linear_fc2."
    own = {
        "expert.gate": Place(name=fc1 + "weight", pattern="(u j) h", within=(("u", 0, 2),)),
        "expert.up": Place(name=fc1 + "weight", pattern="(u j) h", within=(("u", 1, 2),)),
        "expert.gate_up": Place(name=fc1 + "weight", pattern="(c j) h"),
        "expert.gate_up_bias": Place(name=fc1 + "bias", pattern="(c j)"),
        "expert.down": Place(name=fc2 + "weight", pattern="h j"),
        "expert.down_bias": Place(name=fc2 + "bias", pattern="h"),
    }
    weight_map = WeightMap(
        config=config,
        layout=groups.layout,
        stages=stages,
        places={**places(config), **own},  # type: ignore[dict-item]
    )
    return Model(
        config=config, transformer_config=megatron, groups=groups, weight_map=weight_map,
        chunks=(_gpt(config, megatron, groups),),
    )  # fmt: skip


def _gpt(config: Any, megatron: Any, groups: Any) -> Any:
    from mtrl.models.backends.torch_native.layers import LatentAttention

    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp

    class Attention(DotProductAttention):  # type: ignore[misc]
        """Megatron's own, which takes no head dims of latent attention; it is never run here."""

        def __init__(self, *args: Any, k_channels: Any = None, v_channels: Any = None, **more: Any) -> None:
            super().__init__(*args, **more)

    tp, pp = groups.layout.spec.attn.tp, groups.layout.spec.attn.pp
    block = get_gpt_decoder_block_spec(megatron, use_transformer_engine=False, normalization="RMSNorm")
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = Attention
        if config.mla and not config.mla.query_rank:
            # 0.19.2 refuses a norm that has nothing to do, and a projection that it is not fused into.
            attention.q_layernorm = IdentityOp
            layer.submodules.self_attention.module = LatentAttention
    # 101 rows padded to 102 on two ranks, and on one, where rows of a rank stay where they are, to more.
    multiple = tp if tp > 1 else 16
    return GPTModel(
        config=megatron,
        transformer_layer_spec=block,
        vocab_size=-(-config.vocab_size // multiple) * multiple,
        max_sequence_length=config.max_position_embeddings,
        pre_process=groups.coordinates.pp == 0,
        post_process=groups.coordinates.pp == pp - 1,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        pg_collection=groups.collection,
    )


def tensors_of(model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """A rank's tensors in the shapes of the weight map: of the vocabulary without Megatron's own padding."""
    shapes = {p.local.name: p.local.shape for p in model.weight_map.of_rank(model.groups.rank).pieces}
    tensors = {key: tensor for key, tensor in model.tensors().items() if key[1] in shapes}
    assert {name for _, name in tensors} == set(shapes)
    return {key: tensor.detach()[: shapes[key[1]][0]] for key, tensor in tensors.items()}


def fill(model: Any, weights: dict[str, torch.Tensor]) -> None:
    from mtrl.models.pieces import write_stored

    for tensor in model.tensors().values():
        tensor.detach().fill_(float("nan"))
    tensors = tensors_of(model)
    for piece in model.weight_map.of_rank(model.groups.rank).pieces:
        for simple in piece.simple():
            write_stored(tensors, simple, weights[simple.hf.name][simple.stored.slices])


def different(model: Any, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors of which a rank holds another value."""
    from mtrl.models.pieces import read_stored

    tensors = tensors_of(model)
    pieces = [s for p in model.weight_map.of_rank(model.groups.rank).pieces for s in p.simple()]
    return sorted(
        {
            piece.hf.name
            for piece in pieces
            if not torch.equal(read_stored(tensors, piece), weights[piece.hf.name][piece.stored.slices])
        }
    )


def arguments(config: Any) -> Any:
    """What Megatron-LM saves of its command line: everything that such a Namespace is known to hold."""
    import argparse
    import signal

    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    return argparse.Namespace(
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_kv_heads,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM,
        data_path=[Path("a"), None],
        lr=1e-4,
    )


def save_each(folder: str, cases: list[list[Any]]) -> None:
    """On a rank: fill Megatron's models and save them with Megatron, in every form."""
    from megatron.core import dist_checkpointing

    for groups, _, toy, name in each_case(cases):
        weights = load_file(Path(folder) / toy / "model.safetensors")
        for form in saved_forms(groups.layout.world_size, toy):
            model = build(groups, Path(folder) / toy, stacked=form == "stacked")
            fill(model, weights)
            out = Path(folder) / "theirs" / (name + form)
            out.mkdir(parents=True, exist_ok=True)
            state = model.chunks[0].sharded_state_dict(metadata=dict(FORMS[form]))
            state |= {"args": arguments(model.config), "iteration": 3, "checkpoint_version": 3.0}
            dist_checkpointing.save(state, str(out), content_metadata=dict(FORMS[form]))


def load_each(folder: str, cases: list[list[Any]]) -> dict[str, list[str]]:
    """On a rank: load what was written here into Megatron's models with Megatron; what differs, by case."""
    from megatron.core import dist_checkpointing

    found = {}
    for groups, _, toy, name in each_case(cases):
        weights = load_file(Path(folder) / toy / "model.safetensors")
        for form in forms_of(toy, ("separate", "stacked")):
            model = build(groups, Path(folder) / toy, stacked=form == "stacked")
            fill(model, {name: torch.full_like(tensor, 7.0) for name, tensor in weights.items()})
            path = str(Path(folder) / "ours" / f"{toy} {form}" / "release")
            content = dist_checkpointing.load_content_metadata(path)
            assert content is not None and content["non_homogeneous_layers"] is (form == "separate")
            state = {"model": model.chunks[0].sharded_state_dict(metadata=content)}
            model.chunks[0].load_state_dict(dist_checkpointing.load(state, path)["model"])
            found[name + form] = different(model, weights)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every toy, and what is written of it here."""
    made = tmp_path_factory.mktemp("toys")
    for toy in FAMILY_TOYS:
        save(build_family_toy(toy, seed=5), made / toy)
        if toy == "olmoe":
            continue
        with SafetensorsSource(made / toy) as source:
            for form in forms_of(toy, ("separate", "stacked")):
                out, config = made / "ours" / f"{toy} {form}", load_model_config(made / toy)
                write_torch_dist(out, config, source, layers="stacked" if form == "stacked" else "separate")
    return made


def cases_of(size: int) -> list[list[Any]]:
    return [[spec, 1, toy, name_of(spec, toy)] for each, spec, toy in CASES if each == size]


@pytest.fixture(scope="module")
def theirs(world: World, folder: Path) -> Path:
    """What Megatron saved of every case."""
    for size in (1, 4):
        world.run(save_each, {"folder": str(folder), "cases": cases_of(size)}, size=size, timeout_s=240.0)
    return folder / "theirs"


@pytest.fixture(scope="module")
def loaded(world: World, folder: Path) -> dict[str, list[str]]:
    """What any rank of Megatron found to differ, by case and form."""
    found: dict[str, list[str]] = {}
    for size in (1, 4):
        arguments: dict[str, object] = {"folder": str(folder), "cases": cases_of(size)}
        for rank in world.run(load_each, arguments, size=size, timeout_s=240.0):
            for name, names in rank.items():
                found.setdefault(name, []).extend(names)
    return found


def check_same(source: TorchDistSource, expected: dict[str, torch.Tensor]) -> None:
    shapes = source.shapes()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, shape in shapes.items():
        assert torch.equal(source.read(name, Box.full(shape)), expected[name]), name


@pytest.mark.parametrize("size, spec, toy", CASES)
def test_what_megatron_saved_is_read_bit_by_bit(
    theirs: Path, folder: Path, size: int, spec: str, toy: str
) -> None:
    expected = load_file(folder / toy / "model.safetensors")
    for form in saved_forms(size, toy):
        with TorchDistSource(theirs / name_of(spec, toy, form), load_model_config(folder / toy)) as source:
            check_same(source, expected)


@pytest.mark.parametrize("size, spec, toy", CASES)
def test_what_is_written_megatron_loads_bit_by_bit(
    loaded: dict[str, list[str]], size: int, spec: str, toy: str
) -> None:
    forms = forms_of(toy, ("separate", "stacked"))
    assert {form: loaded[name_of(spec, toy, form)] for form in forms} == {form: [] for form in forms}
