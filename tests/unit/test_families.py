"""Reading Hugging Face configs: equal to what transformers makes of them, or refused with the reason."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtrl.models import families
from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig
from mtrl.models.families import Family, Weight, family_of, load_model_config, register_family
from mtrl.models.families.qwen3 import read_dense
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import ModelError, UnknownFamilyError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from tests.toys import SMALL, build_toy, hf_tensors, write_folder

pytestmark = pytest.mark.one_stack

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 48, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 72, "vocab_size": 101,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 40, "norm_topk_prob": True,
}  # fmt: skip


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    yield


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dense", {}),
        ("dense", {"rope_theta": 1000000.0, "head_dim": 32, "tied": True}),
        ("moe", {}),
        ("moe", {"mlp_only_layers": [0, 2], "tied": True, "norm_topk_prob": False}),
        ("moe", {"decoder_sparse_step": 2, "num_experts": 4, "num_hidden_layers": 5}),
        ("moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ],
)
def test_the_weight_table_names_and_shapes_what_transformers_has(
    tmp_path: Path, kind: Any, fields: dict[str, Any]
) -> None:
    model = build_toy(kind, seed=1, **(SMALL | fields))
    config = load_model_config(write_folder(model, tmp_path))
    layout = RankLayout.from_spec(parse_training_spec("megatron:d1"))
    stages = Stages.balanced(config.num_layers, 1)
    found = WeightMap(config=config, layout=layout, stages=stages, places={}).hf_shapes()
    assert found == {name: tuple(tensor.shape) for name, tensor in hf_tensors(model).items()}


@pytest.mark.parametrize("given", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "left_out", ["head_dim", "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"]
)
def test_a_key_left_out_means_what_transformers_takes_it_for(given: dict[str, Any], left_out: str) -> None:
    import transformers

    written = {key: value for key, value in given.items() if key != left_out}
    kind = {"Qwen3ForCausalLM": transformers.Qwen3Config, "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig}
    try:
        found = family_of(written).read_config(written)
    except ModelError as error:
        assert left_out in str(error)
        return
    reference = kind[given["architectures"][0]](**{k: v for k, v in written.items() if k != "architectures"})
    head_dim = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    assert found.head_dim == head_dim
    assert found.num_kv_heads == reference.num_key_value_heads
    assert found.rope.theta == reference.rope_parameters["rope_theta"]
    assert found.norm_eps == reference.rms_norm_eps
    assert found.tie_embeddings == reference.tie_word_embeddings


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_the_rotary_base_is_read_from_old_and_new_configs(rope: dict[str, Any]) -> None:
    assert read_dense(DENSE | rope).rope.theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 32},
            "Qwen3 with use_sliding_window True is not supported; only False",
        ),
        ({"attention_bias": True}, "Qwen3 with attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "Qwen3 with hidden_act 'gelu' is not supported; only 'silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3 KV heads evenly"),
        ({"hidden_size": None}, "config.json has no 'hidden_size', which ['Qwen3ForCausalLM'] needs"),
    ],
)
def test_what_the_family_does_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as raised:
        read_dense(DENSE | change)
    assert message in str(raised.value)


@pytest.mark.parametrize("missing", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_mixture_without_its_sizes_is_refused_by_the_key_that_is_missing(missing: str) -> None:
    written = {key: value for key, value in MOE.items() if key != missing}
    with pytest.raises(ModelError, match=f"config.json has no '{missing}'"):
        family_of(written).read_config(written)


def test_an_unknown_architecture_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownFamilyError) as raised:
        family_of(DENSE | {"architectures": ["MambaForCausalLM"]})
    message = str(raised.value)
    assert "no model family for architectures ['MambaForCausalLM']" in message
    assert "Qwen3ForCausalLM, Qwen3MoeForCausalLM" in message and "register_family" in message
    with pytest.raises(UnknownFamilyError, match=r"no model family for architectures \[\]"):
        family_of({"hidden_size": 3})
    with pytest.raises(UnknownFamilyError, match=r"no family 'mamba'; known: .*qwen3, qwen3_moe"):
        families.family_named("mamba")


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json at .*; give a Hugging Face model folder"):
        load_model_config(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json at"):
        load_model_config(tmp_path / "no_such_folder")
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON \(Expecting value"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"expected a JSON object, found list"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        load_model_config(tmp_path)


def test_the_hugging_face_config_is_kept_whole_and_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE | {"a_key_of_tomorrow": [1]}))
    config = load_model_config(tmp_path)
    assert dict(config.hf_config) == MOE | {"a_key_of_tomorrow": [1]}
    with pytest.raises(TypeError):
        config.hf_config["hidden_size"] = 1  # type: ignore[index]


def read_own(hf: Mapping[str, Any]) -> ModelConfig:
    return replace(read_dense(hf), family="own", qk_norm=False)


def own_weights(config: ModelConfig) -> tuple[Weight, ...]:
    name = "transformer.wte.weight"
    return (Weight(role="embedding", place=Place(name=name, pattern="v h")),)


OWN = Family(name="own", architectures=("OwnForCausalLM",), read_config=read_own, weights=own_weights)


@pytest.mark.usefixtures("registry")
def test_a_family_of_the_users_own_is_found_by_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {"architectures": ["OwnForCausalLM"]}))
    with pytest.raises(UnknownFamilyError):
        load_model_config(tmp_path)
    assert register_family(OWN) is OWN
    register_family(OWN)  # the same family again, as a module imported twice would
    config = load_model_config(tmp_path)
    assert config.family == "own"
    layout = RankLayout.from_spec(parse_training_spec("megatron:t2"))
    places = {"embedding": Place(name="wte", pattern="v h")}
    weight_map = WeightMap(
        config=config,
        layout=layout,
        stages=Stages.balanced(4, 1),
        places=places,  # type: ignore[arg-type]
    )
    assert weight_map.hf_shapes() == {"transformer.wte.weight": (101, 48)}
    assert [piece.stored.ranges[0] for rank in (0, 1) for piece in weight_map.of_rank(rank).pieces] == [
        (0, 51),
        (51, 101),
    ]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("family", "message"),
    [
        (replace(OWN, name="qwen3"), "family 'qwen3' collides with 'qwen3' []"),
        (
            replace(OWN, architectures=("OwnForCausalLM", "Qwen3ForCausalLM")),
            "family 'own' collides with 'qwen3' ['Qwen3ForCausalLM']",
        ),
    ],
)
def test_a_name_or_architecture_that_is_taken_is_refused(family: Family, message: str) -> None:
    with pytest.raises(ModelError) as raised:
        register_family(family)
    assert str(raised.value) == message
    assert families.family_named("qwen3").architectures == ("Qwen3ForCausalLM",)
