"""The files of Megatron's own ``torch_dist`` checkpoints: their index, their chunks, their common state.

The format is pickle inside, and this is the one module that reads or writes any. ``.metadata`` and
``common.pt`` go through unpicklers that know a list of names and build inert records for them: no class or
function of another module is ever called. Chunks are read by ``torch.load(weights_only=True)``.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mtrl.models.boxes import Box
from mtrl.parallel.errors import ModelError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
COMMON_KEY = "common_state/shard_0_1"

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
    "int8", "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip
_DCP = "torch.distributed.checkpoint."
_CORE = "megatron.core."
_ARRAY = ("_reconstruct", "scalar")

# What .metadata of Megatron-Core 0.14 to 0.19 names, plans of older saves among it.
_METADATA_NAMES = frozenset(
    {("torch", name) for name in (*_DTYPES, "Size")}
    | {("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
    | {(_DCP + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {
        (_DCP + "metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        (_DCP + "planner", name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    }
    | {(_CORE + "dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}
)  # fmt: skip

# What Megatron-LM's arguments and counters in the common state name.
_COMMON_NAMES = frozenset(
    {("torch", name) for name in (*_DTYPES, "Size", "device")}
    | {("torch", f"{kind}Storage") for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Long", "Int")}
    | {("torch._utils", "_rebuild_tensor_v2"), ("torch.storage", "UntypedStorage")}
    | {("argparse", "Namespace"), ("types", "SimpleNamespace"), ("signal", "Signals"), ("io", "BytesIO")}
    | {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("_codecs", "encode")}
    | {("collections", name) for name in ("OrderedDict", "defaultdict")}
    | {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.dtypes", "UInt32DType")}
    | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in _ARRAY}
    | {(_CORE + "enums", "ModelType"), (_CORE + "optimizer.optimizer_config", "OptimizerConfig")}
    | {(_CORE + "rerun_state_machine", f"Rerun{name}") for name in ("Diagnostic", "Mode", "State")}
    | {
        (_CORE + "transformer.enums", name)
        for name in ("AttnBackend", "AttnMaskType", "LayerType", "CudaGraphScope", "CudaGraphModule",
                     "InferenceCudaGraphScope")
    }
)  # fmt: skip


class Record:
    """Stands for an object of a pickle, after whose class it is called: what made it, and its state."""

    arguments: tuple[object, ...]
    state: Any
    items: list[object]

    def __new__(cls, *arguments: object) -> "Record":
        """A record that was made from ``arguments``."""
        record = object.__new__(cls)
        record.arguments, record.state, record.items = arguments, None, []
        return record

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, value: object) -> None:
        """An item of a list; unpicklers call this."""
        self.items.append(value)

    def extend(self, values: list[object]) -> None:
        """Several items at once."""
        self.items.extend(values)

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


class _Inert(pickle.Unpickler):
    """Builds records, tuples and dtypes for the names it knows, and refuses every other."""

    def __init__(self, stream: io.BufferedIOBase, names: frozenset[tuple[str, str]], file: Path) -> None:
        super().__init__(stream)
        self._names, self._file = names, file

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global; ModelError for one that is not on the list."""
        if (module, name) not in self._names:
            raise ModelError(
                f"{self._file} names {module}.{name}, which no Megatron checkpoint of weights needs; nothing "
                "was run. Do not open this checkpoint elsewhere unless you trust where it comes from"
            )
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        return tuple if name == "Size" else type(name, (Record,), {})

    def persistent_load(self, pid: object) -> Record:
        """A storage: not read."""
        return Record(pid)


def _unpickle(stream: io.BufferedIOBase, names: frozenset[tuple[str, str]], file: Path) -> Any:
    try:
        return _Inert(stream, names, file).load()
    except ModelError:
        raise
    except Exception as error:  # a malformed pickle raises anything
        raise ModelError(f"{file} cannot be read ({error!r}); copy the checkpoint again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Bytes of a file of the checkpoint."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of the checkpoint and the chunks it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[Box, Stretch], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a checkpoint folder holds: tensors by key, and the common state's bytes where a file of their own
    does not hold it.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    common: Stretch | None = None


def step_folder(folder: Path) -> Path:
    """The folder of one checkpoint: ``folder`` itself, or what its tracker file names.

    Raises:
        ModelError: neither is there, or the tracker names nothing.
    """
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ModelError(
            f"{folder} holds neither .metadata nor {TRACKER}; give a torch_dist checkpoint of Megatron-Core "
            "(iter_XXXXXXX) or the folder above it"
        )
    text = tracker.read_text(encoding="utf-8").strip()
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}" if re.fullmatch(r"\d{1,9}", text) else ""
    if not name or not (folder / name / ".metadata").is_file():
        raise ModelError(f"{tracker} says {text[:40]!r}, and there is no such checkpoint beside it")
    return folder / name


def read_index(folder: Path) -> Index:
    """Read ``.metadata`` of a checkpoint, and check it against the files beside it.

    Raises:
        ModelError: it names what is not on the list, or bytes that are not there; the message says which.
    """
    path = folder / ".metadata"
    with path.open("rb") as stream:
        root = _unpickle(stream, _METADATA_NAMES, path)
    try:
        places = {
            (index["fqn"], index.state.get("offset")): _stretch(folder, info)
            for index, info in root["storage_data"].items()
        }
        tensors = {
            key: _stored_tensor(key, entry, places)
            for key, entry in root["state_dict_metadata"].items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{path} is no index of a checkpoint ({error!r}); copy it again") from error
    return Index(folder=folder, tensors=tensors, common=places.get((COMMON_KEY, None)))


def _stretch(folder: Path, info: Record) -> Stretch:
    name, offset, length = info["relative_path"], info["offset"], info["length"]
    path = folder / name
    if (
        not re.fullmatch(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*", name)
        or path.is_symlink()
        or not path.is_file()
    ):
        raise ModelError(f"{folder}/.metadata names the file {name!r}, which is not a file of the folder")
    if info.state.get("transform_descriptors"):
        raise ModelError(
            f"{folder}: {name} is transformed ({info['transform_descriptors']}); save it plainly"
        )
    size = path.stat().st_size
    if not (type(offset) is type(length) is int and 0 <= offset <= offset + length <= size):
        raise ModelError(
            f"{folder}: .metadata asks for {length} bytes at {offset} of {name}, which has {size}; "
            "copy the checkpoint again"
        )
    return Stretch(file=name, offset=offset, length=length)


def _stored_tensor(key: str, entry: Record, places: Mapping[tuple[str, Any], Stretch]) -> StoredTensor:
    shape, dtype = _sizes(entry["size"]), entry["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has the dtype {dtype!r}")
    chunks = []
    for chunk in entry["chunks"]:
        offsets, sizes = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
        box = Box(tuple((low, low + size) for low, size in zip(offsets, sizes, strict=True)))
        if any(stop > extent for (_, stop), extent in zip(box.ranges, shape, strict=True)):
            raise ValueError(f"{key}: a chunk at {offsets} of {sizes} does not lie in {shape}")
        chunks.append((box, places[key, offsets]))
    return StoredTensor(shape=shape, dtype=dtype, chunks=tuple(chunks))


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(each) is int and each >= 0 for each in value):
        raise ValueError(f"{value!r} is no shape")
    return value


class _Window(io.RawIOBase):
    """A stretch of an open file, as a file: what is read of it is not copied twice."""

    def __init__(self, stream: io.FileIO, stretch: Stretch) -> None:
        super().__init__()
        self._stream, self._start, self._length, self._at = stream, stretch.offset, stretch.length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset within the stretch."""
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most to the end of the stretch."""
        wanted = min(len(buffer), self._length - self._at)
        if wanted <= 0:
            return 0
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(memoryview(buffer)[:wanted])
        self._at += count
        return count


def read_chunk(folder: Path, stretch: Stretch, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A stored chunk, on the CPU.

    Raises:
        ModelError: the bytes are not one tensor of this shape and dtype. Nothing in them is run.
    """
    where = f"{folder / stretch.file}, {stretch.length} bytes at {stretch.offset}"
    try:
        with (folder / stretch.file).open("rb", buffering=0) as stream:
            window: Any = _Window(stream, stretch)
            tensor = torch.load(window, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed archive raises anything
        # torch's own message advises to load it without this protection.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}, which no tensor needs" if named else type(error).__name__
        raise ModelError(f"{where}: not a tensor that can be read safely ({reason})") from None
    if not isinstance(tensor, torch.Tensor) or (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor)
        raise ModelError(f"{where}: .metadata says {shape} {dtype}, the file holds {found}")
    return tensor


def read_common(index: Index) -> dict[str, Any]:
    """The common state: ``args`` (a Record whose state is a dict), ``checkpoint_version`` and others.

    Empty if the checkpoint has none.
    """
    path = index.folder / "common.pt"
    if path.is_file():
        found = _read_archive(path.read_bytes(), path)
        return found if isinstance(found, dict) else {}
    if index.common is None:
        return {}
    path = index.folder / index.common.file
    with path.open("rb") as stream:
        stream.seek(index.common.offset)
        found = _read_archive(stream.read(index.common.length), path)
    return found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}


def _read_archive(data: bytes, path: Path) -> Any:
    """The pickle of a file that ``torch.save`` wrote, storages left out."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(name)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ModelError(f"{path} is not an archive of torch.save ({error}); copy it again") from error
    return _unpickle(io.BytesIO(content), _COMMON_NAMES, path)


def dump_into(value: object, stream: IO[bytes]) -> None:
    """Append ``value`` to a file as ``torch.save`` writes it."""
    torch.save(value, stream)


def dump(value: object) -> bytes:
    """``value`` as ``torch.save`` writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def dump_metadata(tensors: Mapping[str, StoredTensor], states: Mapping[str, Stretch]) -> bytes:
    """``.metadata`` for these tensors and for objects that are no tensors, as torch's reader expects it."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {key: dcp.BytesStorageMetadata() for key in states}
    places: dict[Any, Any] = {}

    def add(index: Any, stretch: Stretch) -> None:
        places[index] = _StorageInfo(stretch.file, stretch.offset, stretch.length)

    for key, stretch in states.items():
        add(dcp.MetadataIndex(key), stretch)
    for key, stored in tensors.items():
        chunks = []
        for box, stretch in stored.chunks:
            offsets = torch.Size(low for low, _ in box.ranges)
            chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size(box.shape)))
            add(dcp.MetadataIndex(key, offsets), stretch)
        properties = dcp.TensorProperties(dtype=stored.dtype)
        entries[key] = dcp.TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
    return pickle.dumps(dcp.Metadata(state_dict_metadata=entries, planner_data=None, storage_data=places))


def dump_common(args: Mapping[str, object], **state: object) -> bytes:
    """``common.pt``: Megatron-LM's arguments, which it wants as a Namespace, and the rest of the state."""
    import argparse

    return dump({"args": argparse.Namespace(**args), **state})
