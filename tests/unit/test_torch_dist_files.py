"""``torch_dist`` files: HF -> torch_dist -> HF is the identity, and nothing that a file says is ever run."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrl.checkpoint import megatron_write
from mtrl.checkpoint.chunk_boxes import view_boxes
from mtrl.checkpoint.megatron_weights import TorchDistSource
from mtrl.checkpoint.megatron_write import write_torch_dist
from mtrl.models.boxes import Box, View
from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.models.sources import SafetensorsSource
from mtrl.parallel.errors import ModelError, OutputExistsError, WeightError
from tests.family_toys import FAMILY_TOYS, build_family_toy, prediction_layer, save


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    for toy in FAMILY_TOYS:
        save(build_family_toy(toy, seed=7), folder / toy)
    return folder


def write(toy: Path, out: Path, **options: Any) -> Path:
    with SafetensorsSource(toy) as source:
        return write_torch_dist(out, load_model_config(toy), source, **options)


def check_same(folder: Path, toy: Path) -> None:
    expected = load_file(toy / "model.safetensors")
    with TorchDistSource(folder, load_model_config(toy)) as source:
        shapes = source.shapes()
        assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name, shape in shapes.items():
            whole = source.read(name, Box.full(shape))
            assert torch.equal(whole, expected[name]), name
            inside = Box(tuple((size // 3, size // 3 + (size + 1) // 2) for size in shape))
            assert torch.equal(source.read(name, inside), expected[name][inside.slices]), name


@pytest.mark.parametrize("chunk_bytes", [megatron_write.CHUNK_BYTES, 3000], ids=["whole", "cut"])
@pytest.mark.parametrize("toy", [toy for toy in FAMILY_TOYS if toy != "olmoe"])
def test_what_is_written_is_read_bit_by_bit(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(megatron_write, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(megatron_write, "FILE_BYTES", 100_000)
    config = load_model_config(toys / toy)
    made = write(toys / toy, tmp_path / "out")
    assert made == tmp_path / "out" / "release" and len(list(made.glob("*.distcp"))) > 1
    check_same(tmp_path / "out", toys / toy)
    if config.dense_layers and config.moe_layers:
        with pytest.raises(ModelError, match="no tensors in common to stack"):
            write(toys / toy, tmp_path / "stacked", layers="stacked")
    else:
        write(toys / toy, tmp_path / "stacked", layers="stacked", iteration=12)
        assert (tmp_path / "stacked" / "latest_checkpointed_iteration.txt").read_text() == "12"
        check_same(tmp_path / "stacked" / "iter_0000012", toys / toy)


def test_a_family_without_keys_is_refused_by_name(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="olmoe: queries and keys are normalised over all heads"):
        write(toys / "olmoe", tmp_path)
    with pytest.raises(ModelError, match=r"olmoe: .*q_layernorm"):
        TorchDistSource(tmp_path, load_model_config(toys / "olmoe"))


def test_every_cut_of_a_tensor_is_boxes_of_its_view() -> None:
    view = View(name="w", shape=(12, 3), factors=((2, 3, 2), (3,)), order=(3, 0, 2, 1))
    numbers = torch.arange(36).view(12, 3)
    for start in range(12):
        for stop in range(start + 1, 13):
            found: list[int] = []
            for box in view_boxes(view, Box(((start, stop), (1, 3)))):
                stored = view.stored_box(box)
                assert stored is not None and stored.num_elements == box.num_elements
                found += numbers[stored.slices].flatten().tolist()
            assert sorted(found) == sorted(numbers[start:stop, 1:3].flatten().tolist())


def test_floats_are_written_in_the_dtype_asked_for_and_biases_of_the_choice_in_float32(
    toys: Path, tmp_path: Path
) -> None:
    write(toys / "glm4 moe", tmp_path, dtype=torch.bfloat16)
    expected = load_file(toys / "glm4 moe" / "model.safetensors")
    with TorchDistSource(tmp_path, load_model_config(toys / "glm4 moe")) as source:
        for name, shape in source.shapes().items():
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert torch.equal(source.read(name, Box.full(shape)), expected[name].to(dtype))


def test_prediction_layers_are_left_out_only_when_they_are_named(toys: Path, tmp_path: Path) -> None:
    toy = tmp_path / "toy"
    shutil.copytree(toys / "glm4 moe", toy)
    tensors = load_file(toy / "model.safetensors")
    more = prediction_layer(tensors, 4)
    save_file(tensors | more, toy / "model.safetensors")
    with pytest.raises(ModelError, match=f"{len(more)} tensors of multi-token prediction layers"):
        write(toy, tmp_path / "out")
    write(toy, tmp_path / "out", leave_out=tuple(more))
    check_same(tmp_path / "out", toys / "glm4 moe")


def test_what_is_there_is_not_written_over_and_half_of_a_write_is_not_seen(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(toys / "llama", tmp_path, iteration=1)
    with pytest.raises(OutputExistsError, match="iter_0000001"):
        write(toys / "llama", tmp_path, iteration=1)

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(megatron_write, "dump_metadata", full)
    with pytest.raises(OSError, match="No space"):
        write(toys / "llama", tmp_path, iteration=2)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert not (tmp_path / "iter_0000002").exists()
    check_same(tmp_path, toys / "llama")


def test_parts_of_one_tensor_in_several_dtypes_need_one_to_be_given(toys: Path, tmp_path: Path) -> None:
    toy = tmp_path / "toy"
    shutil.copytree(toys / "llama", toy)
    tensors = load_file(toy / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors[
        "model.layers.1.self_attn.k_proj.weight"
    ].half()
    save_file(tensors, toy / "model.safetensors")
    with pytest.raises(WeightError, match=r"k_proj.weight is torch.float16 .* give the dtype"):
        write(toy, tmp_path / "out")


class Canary:
    """Unpickled by anything that trusts it, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_the_canary_sings_where_pickles_are_trusted(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "sung")))  # noqa: S301 (written above)
    assert (tmp_path / "sung").exists()


def put_canary(folder: Path, file: str, canary: Canary) -> None:
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(canary))
    elif file == "common.pt":
        torch.save({"iteration": canary}, folder / file)
    else:
        stream = io.BytesIO()
        torch.save(canary, stream)
        first = folder / "__0_0.distcp"
        first.write_bytes(stream.getvalue().ljust(first.stat().st_size, b"\0"))
        index = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (written above)
        for info in index.storage_data.values():
            info.offset, info.length = 0, len(stream.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("file", [".metadata", "common.pt", "a chunk"])
def test_nothing_that_a_file_pickles_is_run(toys: Path, tmp_path: Path, file: str) -> None:
    folder = write(toys / "llama", tmp_path)
    put_canary(folder, file, Canary(tmp_path / "sung"))
    with pytest.raises(
        ModelError, match=r"names (posix|nt)\.mkdir, which|read safely \(it names (posix|nt)\.mkdir"
    ):
        check_same(folder, toys / "llama")
    assert not (tmp_path / "sung").exists()


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (written above)
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def first_place(index: Any) -> Any:
    return next(info for key, info in index.storage_data.items() if key.fqn == "output_layer.weight")


def rename(index: Any, to: str) -> None:
    first_place(index).relative_path = to


def stretch(index: Any, offset: int, length: int) -> None:
    first_place(index).offset, first_place(index).length = offset, length


def reshape(index: Any, key: str, size: tuple[int, ...]) -> None:
    index.state_dict_metadata[key].size = torch.Size(size)


def drop(index: Any, key: str) -> None:
    del index.state_dict_metadata[key]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: rename(index, "../secret"), "'../secret', which is not a file of the folder"),
        (lambda index: rename(index, "/etc/passwd"), "'/etc/passwd', which is not"),
        (lambda index: rename(index, "link.distcp"), "'link.distcp', which is not"),
        (lambda index: rename(index, "gone.distcp"), "'gone.distcp', which is not"),
        (lambda index: stretch(index, 0, 10**12), "asks for 1000000000000 bytes at 0"),
        (lambda index: stretch(index, -5, 10), "asks for 10 bytes at -5"),
        (lambda index: stretch(index, 0, 0), "not a tensor that can be read safely"),
        (lambda index: reshape(index, "output_layer.weight", (7, 48)), "does not lie in"),
        (lambda index: drop(index, "output_layer.weight"), "missing: output_layer.weight"),
    ],
)
def test_a_malformed_index_is_refused(
    toys: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    folder = write(toys / "llama", tmp_path)
    (folder / "link.distcp").symlink_to(folder / "__0_0.distcp")
    edit(folder, change)
    with pytest.raises((ModelError, WeightError), match=message):
        check_same(folder, toys / "llama")


@pytest.mark.parametrize("keep", [0, 1, 40, 2000], ids=str)
@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_file_that_was_cut_short_is_refused(toys: Path, tmp_path: Path, file: str, keep: int) -> None:
    folder = write(toys / "llama", tmp_path)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: min(keep, len(whole) - 1)])
    with pytest.raises(ModelError, match=file.replace(".", r"\.")):
        check_same(folder, toys / "llama")


def test_another_models_checkpoint_is_refused_with_its_shapes(toys: Path, tmp_path: Path) -> None:
    write(toys / "llama", tmp_path)
    with pytest.raises(WeightError, match=r"missing: decoder\.layers\.0\.self_attention\.q_layernorm"):
        check_same(tmp_path, toys / "qwen3")
    write(toys / "qwen3", tmp_path / "b")
    with pytest.raises(WeightError, match=r"unknown: decoder\.layers\.0\.self_attention\.q_layernorm"):
        check_same(tmp_path / "b", toys / "llama")


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_query_groups", 2),
        ("rotary_interleaved", True),
        ("apply_layernorm_1p", True),
        ("kv_channels", 16),
    ],
)
def test_arguments_that_give_the_same_shapes_another_meaning_are_refused(
    toys: Path, tmp_path: Path, name: str, value: object
) -> None:
    folder = write(toys / "llama", tmp_path)
    common = torch.load(folder / "common.pt", weights_only=False)
    setattr(common["args"], name, value)
    torch.save(common, folder / "common.pt")
    with pytest.raises(ModelError, match=f"written with {name} {value}"):
        check_same(folder, toys / "llama")


def test_heads_in_the_order_of_the_first_checkpoints_are_refused(toys: Path, tmp_path: Path) -> None:
    folder = write(toys / "llama", tmp_path)
    torch.save({"checkpoint_version": 1.0}, folder / "common.pt")
    with pytest.raises(ModelError, match=r"checkpoint_version 1\.0 orders heads otherwise"):
        check_same(folder, toys / "llama")


def test_a_folder_that_holds_no_checkpoint_is_refused(toys: Path, tmp_path: Path) -> None:
    config: ModelConfig = load_model_config(toys / "llama")
    with pytest.raises(ModelError, match=r"holds neither \.metadata nor latest"):
        TorchDistSource(tmp_path, config).__enter__()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../7")
    with pytest.raises(ModelError, match=r"says '\.\./7'"):
        TorchDistSource(tmp_path, config).__enter__()
