"""Safetensors written as a stream, tensor by tensor, into durable files."""

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from mtrl.models.durable import DurableFile, FileRecord, write_file

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

TensorKind = tuple[torch.dtype, tuple[int, ...]]


class SafetensorsWriter:
    """A new safetensors file, written tensor by tensor. A context manager.

    ``tensors`` names all of them with dtype and shape, in the order in which they are written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorKind], *, hashed: bool = True) -> None:
        self.path, self._pending, self._kinds = path, deque(tensors), dict(tensors)
        self._file = DurableFile(path, hashed=hashed)
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
