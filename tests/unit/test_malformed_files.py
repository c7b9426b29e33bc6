"""Files of weights that are damaged, or made to do harm, are refused by name and run nothing."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtrl.models.boxes import Box
from mtrl.models.hf_folder import INDEX_NAME, SINGLE_NAME, folder_shapes, quantized_blocks, weight_files
from mtrl.models.quantized import open_folder
from mtrl.models.safetensors_header import MAX_HEADER_BYTES, read_headers
from mtrl.models.sources import SafetensorsSource
from mtrl.parallel.errors import ModelError

pytestmark = pytest.mark.one_stack

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}


def write(file: Path, header: dict[str, Any] | bytes, num_bytes: int = 34, length: int | None = None) -> Path:
    """A file of ``header`` and so many bytes of data; ``length`` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_bytes))
    return file


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two files and an index, as transformers writes them."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    weights = [{"a": torch.ones(2, 3), "b": torch.ones(5)}, {"c": torch.arange(8).reshape(4, 2).bfloat16()}]
    for name, tensors in zip(SHARDS, weights, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    write_index(folder, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def harmful(canary: Path) -> bytes:
    """A pickle that makes ``canary`` when it is read; written by hand, since no file here pickles."""
    return f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()


def refused(folder: Path, match: str) -> None:
    """Every way into a folder's weights refuses it with that reason."""

    def opened() -> None:
        with SafetensorsSource(folder), open_folder(folder):
            raise AssertionError("the weights were opened")

    for read in (weight_files, folder_shapes, lambda _: opened()):
        with pytest.raises(ModelError, match=match):
            read(folder)


def test_a_whole_file_says_where_each_tensor_lies(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 7], "data_offsets": [24, 24]}
    header = {"__metadata__": {"format": "pt"}, "b": B, "a": A, "none": empty}
    file = write(tmp_path / "x.safetensors", header)
    found, start = read_headers(file), 8 + len(json.dumps(header))
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        "b": ((5,), "BF16"), "a": ((2, 3), "F32"), "none": ((0, 7), "F32"),
    }  # fmt: skip
    assert (found["a"].begin, found["a"].end, found["b"].begin, found["b"].end) == (
        start, start + 24, start + 24, start + 34,
    )  # fmt: skip
    assert file.stat().st_size == start + 34


def test_tensors_of_less_than_a_byte_and_of_unknown_kinds_are_listed(tmp_path: Path) -> None:
    odd = {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}
    new = {"dtype": "F2_NEW", "shape": [9], "data_offsets": [3, 34]}
    file = write(tmp_path / SINGLE_NAME, {"a": odd, "b": new})
    assert [each.dtype for each in read_headers(file).values()] == ["F4", "F2_NEW"]
    with pytest.raises(ModelError, match=r"2 tensors in a format that is not read, the first is a \(F4\)"):
        folder_shapes(tmp_path)


TENSOR_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": 4}, "tensor b: dtype 4 is no name"),
    "a negative size": ({"shape": [-5]}, r"tensor b: shape \[-5\] is no list"),
    "a fraction": ({"shape": [5.0]}, r"tensor b: shape \[5.0\] is no list"),
    "true": ({"shape": [5, True]}, r"tensor b: shape \[5, True\] is no list"),
    "a size of more than memory": ({"shape": [0, 2**63]}, "tensor b: shape .* is no list"),
    "a million sizes": ({"shape": [1] * 10**6}, "tensor b: shape .* is no list of up to 64 sizes"),
    "no list": ({"shape": 5}, "tensor b: shape 5 is no list"),
    "begin after end": ({"data_offsets": [34, 24]}, "tensor b: data_offsets .* are no begin and end"),
    "one offset": ({"data_offsets": [24]}, "tensor b: data_offsets .* are no begin and end"),
    "a negative offset": ({"data_offsets": [-10, 0]}, "tensor b: data_offsets .* are no begin and end"),
    "true as an offset": ({"data_offsets": [24, True]}, "tensor b: data_offsets .* are no begin and end"),
    "beyond the file": ({"data_offsets": [24, 2**40]}, "tensor b ends at byte 1099511"),
    "fewer bytes": ({"shape": [6]}, r"tensor b: BF16 of shape \[6\] has other than 10 bytes"),
    "a wrapped product": ({"shape": [2**62, 5, 4]}, "tensor b: BF16 of shape .* has other than 10 bytes"),
    "an overlap": ({"data_offsets": [23, 33]}, "tensor a and tensor b overlap"),
    "the same place": ({"shape": [12], "data_offsets": [0, 24]}, "tensor a and tensor b overlap"),
    "a gap": ({"shape": [4], "data_offsets": [26, 34]}, "tensor a and tensor b leave 2 bytes between them"),
    "bytes at the end": (
        {"shape": [4], "data_offsets": [24, 32]},
        "the file has .* bytes and its header says",
    ),
    "something else": ({"strides": [1]}, "tensor b: .* is not dtype, shape and data_offsets"),
}


@pytest.mark.parametrize(("change", "reason"), TENSOR_REFUSED.values(), ids=TENSOR_REFUSED)
def test_a_tensor_that_cannot_be_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write(tmp_path / SINGLE_NAME, {"a": A, "b": B | change})
    refused(tmp_path, rf"{SINGLE_NAME} is no whole safetensors file: {reason}.*; download it again")


HEADER_REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it begins with b'', not with"),
    "a list": (b"[]", "it begins with b'..', not with"),
    "a blank first": (b' {"a": 1}', "it begins with .*, not with"),
    "another encoding": ('{"a": 1}'.encode("utf-16-le"), "Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', "can't decode byte 0xff"),
    "cut short": (b'{"a": {"dtype": "F32"', "Expecting ',' delimiter"),
    "more after the end": (b"{}{}", "Extra data"),
    "a key twice": (b'{"a": {"dtype": "F32", "dtype": "F64"}}', "the key 'dtype' occurs twice"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON"),
    "a long number": (b'{"a": ' + b"1" * 5000 + b"}", "integer string conversion"),
    "deep": (b'{"a":' * 100_000, "recursion"),
    "metadata of numbers": (
        b'{"__metadata__": {"format": 1}}',
        "__metadata__ is .* must map strings to strings",
    ),
    "metadata that is none": (b'{"__metadata__": "pt"}', "__metadata__ is 'pt', and must map"),
    "no tensor": (b'{"a": 1}', "tensor a: 1 is not dtype, shape and data_offsets"),
    "no name": (b'{"": {}}', "a tensor has the name ''"),
    "a name that clears the screen": (b'{"\\u001b[2J": {}}', r"a tensor has the name '\\x1b\[2J'"),
    "half a character": (b'{"\\ud800": {}}', r"a tensor has the name '\\ud800'"),
    "no tensors but bytes": (b"{}", "bytes and its header says"),
}


@pytest.mark.parametrize(("header", "reason"), HEADER_REFUSED.values(), ids=HEADER_REFUSED)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    write(tmp_path / SINGLE_NAME, header)
    refused(tmp_path, rf"(?s){SINGLE_NAME} is no whole safetensors file: .*{reason}")


def test_a_tensor_that_occurs_twice_in_a_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_NAME, f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}'.encode(), 24)
    refused(tmp_path, "the key 'a' occurs twice")


@pytest.mark.parametrize("length", [35, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_than_any_is_not_read(tmp_path: Path, length: int) -> None:
    file = write(tmp_path / SINGLE_NAME, b"{}", 0, length)
    refused(tmp_path, f"its header has {length} bytes, the file 10")
    os.truncate(file, 2 * MAX_HEADER_BYTES)  # sparse
    if length > MAX_HEADER_BYTES:
        refused(tmp_path, f"its header has {length} bytes, the file 200000000")


def damages(canary: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Names of damages, and functions that do them to a file."""

    def zipped(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", harmful(canary))

    def behind_a_header(file: Path) -> None:
        file.write_bytes(struct.pack("<Q", 2) + b"{}" + harmful(canary))

    def replaced(file: Path, make: Callable[[Path], object]) -> None:
        file.unlink()
        make(file)

    yield "empty", lambda file: file.write_bytes(b"")
    yield "seven bytes", lambda file: os.truncate(file, 7)
    yield "half", lambda file: os.truncate(file, file.stat().st_size // 2)
    yield "one byte less", lambda file: os.truncate(file, file.stat().st_size - 1)
    yield "one byte more", lambda file: file.write_bytes(file.read_bytes() + b"\0")
    yield "zeros", lambda file: file.write_bytes(bytes(file.stat().st_size))
    yield "a pickle", lambda file: file.write_bytes(harmful(canary))
    yield "torch's zip of a pickle", zipped
    yield "a pickle behind a header", behind_a_header
    yield "a folder", lambda file: replaced(file, Path.mkdir)
    yield "a named pipe", lambda file: replaced(file, os.mkfifo)
    yield "a device", lambda file: replaced(file, lambda path: path.symlink_to("/dev/zero"))
    yield "a link to nothing", lambda file: replaced(file, lambda path: path.symlink_to("nowhere"))
    yield "a link to itself", lambda file: replaced(file, lambda path: path.symlink_to(path.name))


DAMAGES = [name for name, _ in damages(Path())]


def test_the_canary_is_alive(tmp_path: Path) -> None:
    """A pickle that could do no harm would show nothing."""
    (tmp_path / "pickle").write_bytes(harmful(tmp_path / "canary"))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "pickle")], check=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*SHARDS, INDEX_NAME])
def test_a_damaged_file_of_a_folder_is_named_and_runs_nothing(
    sharded: Path, tmp_path: Path, name: str, damage: str
) -> None:
    dict(damages(tmp_path / "canary"))[damage](sharded / name)
    refused(sharded, name)
    assert not (tmp_path / "canary").exists()


def test_no_flipped_bit_of_a_header_changes_what_is_read(sharded: Path) -> None:
    whole = folder_shapes(sharded)
    file = sharded / SHARDS[0]
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    num_refused = 0
    for bit in range(8 * end):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            assert folder_shapes(sharded) == whole
        except ModelError as error:
            assert SHARDS[0] in str(error) or "is not read" in str(error)
            num_refused += 1
    # The others are in the metadata and in blanks.
    assert num_refused > 6 * end


def test_no_flipped_bit_of_an_index_changes_what_is_read(sharded: Path) -> None:
    whole = folder_shapes(sharded)
    content = (sharded / INDEX_NAME).read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (sharded / INDEX_NAME).write_bytes(damaged)
        try:
            assert folder_shapes(sharded) == whole
        except ModelError as error:
            assert INDEX_NAME in str(error)


@pytest.mark.parametrize(
    "name",
    [
        *("../model.safetensors", "/model.safetensors", "sub/model.safetensors", "..\\model.safetensors"),
        *("model.bin", "..", "", "model.safetensors\0", "model.safetensors/..", "a\nb.safetensors", None, 7),
        *({"file": SHARDS[0]}, [SHARDS[0]]),
    ],
)
def test_a_name_that_leads_out_of_the_folder_is_refused(sharded: Path, name: object) -> None:
    # What it leads to is there: it is not for want of it that the name is refused.
    for other in (sharded.parent / "model.safetensors", sharded / "model.bin"):
        other.write_bytes((sharded / SHARDS[1]).read_bytes())
    (sharded / "sub").mkdir()
    (sharded / "sub" / "model.safetensors").write_bytes((sharded / SHARDS[1]).read_bytes())
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": name})
    refused(sharded, rf"{INDEX_NAME} cannot be used: .* is not the name of a safetensors file in the folder")


@pytest.mark.parametrize("weight_map", [None, [], {}, "a", ["a"], 3])
def test_an_index_that_names_no_files_is_refused(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    refused(sharded, f"{INDEX_NAME} cannot be used: weight_map is no object that names files")


def test_a_tensor_is_in_the_one_file_that_the_index_says(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    refused(sharded, f"{SHARDS[1]} lacks 'b', which {INDEX_NAME} says it holds")
    write_index(sharded, {"a": SHARDS[0], "c": SHARDS[1]})
    assert folder_shapes(sharded) == {"a": (2, 3), "b": (5,), "c": (4, 2)}
    save_file({"b": torch.zeros(5), "c": torch.zeros(4, 2)}, sharded / SHARDS[1])
    refused(sharded, f"both {SHARDS[0]} and {SHARDS[1]} hold b")


def test_an_index_too_large_to_be_one_is_not_read(sharded: Path) -> None:
    os.truncate(sharded / INDEX_NAME, MAX_HEADER_BYTES + 1)
    refused(sharded, f"{INDEX_NAME} cannot be used: it has {MAX_HEADER_BYTES + 1} bytes")


def test_the_cache_of_the_hub_is_read_through_its_links(sharded: Path, tmp_path: Path) -> None:
    """Its snapshots hold links to ``../../blobs``."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert weight_files(snapshot) == [snapshot / name for name in SHARDS]
    with open_folder(snapshot) as source:
        assert source.read("c", Box.full((4, 2))).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], None),
        (["fp8"], "quantization_config in config.json is .'fp8'., and must be an object"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size .* is \[0, 128\]; two"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size .* is \[128\]; two"),
        ({"quant_method": "fp8", "weight_block_size": ["a", None]}, "weight_block_size .*; two"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size .* is 128; two"),
    ],
)
def test_blocks_have_sizes(tmp_path: Path, settings: object, reason: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    if reason is None:
        assert quantized_blocks(tmp_path) is None
        return
    with pytest.raises(ModelError, match=reason):
        quantized_blocks(tmp_path)
