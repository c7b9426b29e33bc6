"""Files that are on disk when they are said to be, with their checksums. Needs no torch.

Every write of a checkpoint goes through here, by ``os`` calls that fail as the system says (a full disk is an
OSError of the call that met it) and that tests can count and interrupt.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

BUFFER_BYTES = 2**20
PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file as it was written: ``name`` relative to the checkpoint, size, SHA-256 in hexadecimal digits.

    ``sha256`` is empty where none was asked for.
    """

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

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        self.path, self.num_bytes = path, 0
        self._hash = hashlib.sha256() if hashed else None
        self._buffer = bytearray()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        """Append; small writes are collected."""
        if self._hash is not None:
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
        digest = self._hash.hexdigest() if self._hash is not None else ""
        return FileRecord(name=self.path.name, num_bytes=self.num_bytes, sha256=digest)

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
