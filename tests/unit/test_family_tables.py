"""Every family's weight table: the names and shapes that transformers publishes, in each format it writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mtrl.models.families import family_of, known_architectures, load_model_config
from mtrl.models.hf_folder import check_names, folder_shapes
from mtrl.models.stages import Stages
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.errors import WeightError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from tests.family_toys import FAMILY_TOYS, build_family_toy, save
from tests.unit.test_family_configs import NOT_OURS, PUBLISHED

pytestmark = pytest.mark.one_stack

PER_EXPERT = ("qwen2 moe", "qwen3 moe", "mixtral", "olmoe", "glm4 moe", "deepseek v3", "moonlight")


def weight_map(config: Any) -> WeightMap:
    layout = RankLayout.from_spec(parse_training_spec("megatron:d1"))
    return WeightMap(config=config, layout=layout, stages=Stages.balanced(config.num_layers, 1), places={})


@pytest.mark.parametrize("name", FAMILY_TOYS)
def test_the_table_names_and_shapes_what_transformers_publishes(name: str, tmp_path: Path) -> None:
    save(build_family_toy(name), tmp_path)
    table = weight_map(load_model_config(tmp_path))
    found = folder_shapes(tmp_path)
    assert table.hf_shapes() == found
    assert table.in_format_of(found).format_number == 0


@pytest.mark.parametrize("name", PER_EXPERT)
def test_a_folder_of_fused_experts_is_told_by_its_names(name: str, tmp_path: Path) -> None:
    save(build_family_toy(name), tmp_path, save_original_format=False)
    config = load_model_config(tmp_path)
    found = folder_shapes(tmp_path)
    table = weight_map(config)
    assert table.hf_shapes() != found
    chosen = table.in_format_of(found)
    assert chosen.hf_shapes() == found
    with pytest.raises(WeightError, match=r"missing: model\.layers\.\d\.mlp\.experts\.gate_up_proj \(8,"):
        fewer = {key: shape for key, shape in found.items() if "gate_up_proj" not in key}
        check_names(config, table.in_format_of(fewer).hf_shapes(), fewer)


@pytest.mark.parametrize("name", FAMILY_TOYS)
def test_a_tensor_more_or_less_or_of_another_shape_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    save(build_family_toy(name), tmp_path)
    config = load_model_config(tmp_path)
    found = folder_shapes(tmp_path)
    expected = weight_map(config).hf_shapes()
    norm = "model.layers.2.input_layernorm.weight"
    for wrong, message in (
        ({key: shape for key, shape in found.items() if key != norm}, f"missing: {norm} (48,)"),
        (found | {"model.layers.5.input_layernorm.weight": (48,)}, "unknown: model.layers.5.input_layernorm"),
        (found | {norm: (49,)}, f"shape of {norm}: (49,), config.json implies (48,)"),
    ):
        with pytest.raises(WeightError) as raised:
            check_names(config, expected, wrong)
        assert message in str(raised.value)
        assert f"the {config.family} weight table (1 problems)" in str(raised.value)


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_has_as_many_weights_as_transformers_and_its_name_say(model: str) -> None:
    hf, billions = PUBLISHED[model]
    config = family_of(hf).read_config(hf)
    num_weights = sum(torch.Size(shape).numel() for shape in weight_map(config).hf_shapes().values())
    prefix = hf["architectures"][0].removesuffix("ForCausalLM")
    own = getattr(transformers, prefix + "Config")(**{k: v for k, v in hf.items() if k not in NOT_OURS})
    with torch.device("meta"):
        network = getattr(transformers, prefix + "ForCausalLM")(own)
    biases = [tensor for name, tensor in network.named_buffers() if "e_score_correction_bias" in name]
    assert num_weights == sum(tensor.numel() for tensor in [*network.parameters(), *biases])
    assert round(num_weights / 1e9, 1) == billions


def test_every_family_has_a_toy() -> None:
    assert set(known_architectures()) == {prefix + "ForCausalLM" for prefix, _ in FAMILY_TOYS.values()}
