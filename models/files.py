"""Files that are on disk when they are said to be, with their checksums; safetensors written as a stream.

Every write of a checkpoint goes through here, by ``os`` calls that fail as the system says (a full disk is an
OSError of the call that met it) and that tests can count and interrupt.
"""

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch

BUFFER_BYTES = 2**20
PIECE_BYTES = 8 * 2**20

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

TensorKind = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file as it was written: ``name`` relative to the checkpoint, size, SHA-256 in hexadecimal digits."""

    name: str
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)


class DurableFile:
    """A new file, hashed while it is written; its bytes are on disk when `close` returns. A context manager.

    Raises FileExistsError if there is one of the name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes = path, 0
        self._hash, self._buffer = hashlib.sha256(), bytearray()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        """Append; small writes are collected."""
        self._hash.update(data)
        self.num_bytes += len(data)
        if len(data) < BUFFER_BYTES:
            self._buffer += data
            if len(self._buffer) >= BUFFER_BYTES:
                self._flush()
            return
        self._flush()
        _write_all(self._descriptor, memoryview(data), self.path)

    def close(self) -> FileRecord:
        """Force the bytes to disk."""
        try:
            self._flush()
            with _named(self.path):
                os.fsync(self._descriptor)
        finally:
            self.abandon()
        return FileRecord(name=self.path.name, num_bytes=self.num_bytes, sha256=self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without a promise; the file stays as far as it was written."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        _write_all(self._descriptor, memoryview(data), self.path)


def _write_all(descriptor: int, data: memoryview, path: Path) -> None:
    with _named(path):
        while len(data):
            data = data[os.write(descriptor, data[:PIECE_BYTES]) :]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Calls on descriptors fail without saying which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def write_file(path: Path, data: bytes) -> FileRecord:
    """A new file with this content, on disk on return."""
    with DurableFile(path) as file:
        file.write(data)
        return file.close()


def replace_file(path: Path, data: bytes) -> None:
    """Write a neighbour of ``path``, force it to disk, rename it over ``path``, force the name to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    write_file(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with _named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> FileRecord:
    """Size and checksum of a file as it is now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(name=path.name, num_bytes=path.stat().st_size, sha256=digest)


class SafetensorsWriter:
    """A new safetensors file, written tensor by tensor. A context manager.

    ``tensors`` names all of them with dtype and shape, in the order in which they are written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorKind]) -> None:
        self.path, self._pending, self._kinds = path, deque(tensors), dict(tensors)
        self._file = DurableFile(path)
        self._file.write(_header(tensors))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, of the dtype and shape that were announced."""
        assert self._pending.popleft() == name, f"{self.path}: {name} out of turn"
        assert self._kinds[name] == (tensor.dtype, tuple(tensor.shape)), f"{self.path}: {name}"
        self._file.write(_bytes_of(tensor))

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """The next tensor, in parts that follow each other in its memory."""
        assert self._pending.popleft() == name, f"{self.path}: {name} out of turn"
        dtype, shape = self._kinds[name]
        left = torch.Size(shape).numel()
        for part in parts:
            assert part.dtype == dtype, f"{self.path}: {name}"
            left -= part.numel()
            self._file.write(_bytes_of(part))
        assert left == 0, f"{self.path}: {name}"

    def close(self) -> FileRecord:
        """Force the file to disk."""
        assert not self._pending, f"{self.path}: {self._pending[0]} was never written"
        return self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.abandon()


PutTensor = Callable[[str, torch.Tensor], None]


class FileSink(Protocol):
    """Takes the files of a folder, by names relative to it."""

    def write(self, name: str, data: bytes) -> None:
        """A file with this content."""
        ...

    def tensors(self, name: str, kinds: Mapping[str, TensorKind]) -> AbstractContextManager[PutTensor]:
        """A safetensors file; inside, call what is given for each tensor, in the order of ``kinds``."""
        ...


class FolderWriter:
    """Writes files into a folder, each to the disk, and keeps their records.

    After an OSError, kept as ``error``, it does nothing more and raises nothing: a rank can so take its part
    in collective operations to their end, and then tell the others (``agreement.agree``).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[FileRecord] = []
        self.error: OSError | None = None

    def write(self, name: str, data: bytes) -> None:
        """A file with this content."""
        self._try(lambda: self._keep(name, write_file(self._path(name), data)))

    @contextmanager
    def tensors(self, name: str, kinds: Mapping[str, TensorKind]) -> Iterator[PutTensor]:
        """A safetensors file; see `FileSink`."""
        writers: list[SafetensorsWriter] = []
        self._try(lambda: writers.append(SafetensorsWriter(self._path(name), kinds)))
        with ExitStack() as stack:
            for writer in writers:
                stack.enter_context(writer)
            yield lambda key, tensor: self._try(lambda: writers[0].write(key, tensor))
            self._try(lambda: self._keep(name, writers[0].close()))

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _keep(self, name: str, record: FileRecord) -> None:
        self.records.append(replace(record, name=name))

    def _try(self, action: Callable[[], None]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error


def _header(tensors: Mapping[str, TensorKind]) -> bytes:
    """Length and JSON of a safetensors header, padded so that the data begin at a multiple of eight."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data) if flat.numel() else memoryview(b"")
