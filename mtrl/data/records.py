"""Read the records of a JSONL file or of a Hugging Face ``datasets`` folder.

Both come out as `Record`, whose ``where`` is what an error about it begins with. What the fields
mean is left to ``load.py``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mtrl.parallel.errors import DataError, MissingPackageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record. ``index`` counts from 0; ``where`` names file and line, or folder and row, for people."""

    index: int
    where: str
    fields: Mapping[str, Any]

    def error(self, reason: str) -> DataError:
        """Build, but do not raise, the error that says ``reason`` about this record."""
        return DataError(f"{self.where}: {reason}")


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a ``.jsonl`` file, or of a folder that ``Dataset.save_to_disk`` wrote.

    Blank lines of a file are skipped and get no index. Raises `DataError` for what is unreadable and
    `MissingPackageError` for a folder where ``datasets`` is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; give a .jsonl file or a folder written by save_to_disk"
        )
    records = _read_datasets_folder(path) if path.is_dir() else _read_jsonl(path)
    count = 0
    for count, record in enumerate(records, start=1):  # noqa: B007 - the count is read after the loop
        yield record
    if count == 0:
        raise DataError(f"{path}: holds no records; write at least one, one JSON object a line")


def _read_jsonl(path: Path) -> Iterator[Record]:
    index = 0
    # Bytes, so that only "\n" ends a line: JSON strings may hold U+2028, which str.splitlines breaks at.
    with _opened(path) as file:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                yield Record(
                    index=index, where=f"{path}:{line_number}", fields=_parse(path, line_number, line)
                )
                index += 1


def _opened(path: Path) -> BinaryIO:
    # Opening a named pipe may never return.
    if not path.is_file():
        raise DataError(f"{path}: neither a file nor a folder; give a .jsonl file")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(path: Path, line_number: int, line: bytes) -> Mapping[str, Any]:
    where = f"{path}:{line_number}"
    try:
        value = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "write one whole JSON object on each line (JSONL), not an indented one or an array"
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}; {hint}") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply; a record is a flat JSON object") from error
    if not isinstance(value, dict):
        raise DataError(
            f'{where}: holds {_kind(value)}; each line must be an object such as {{"prompt": "1+1="}}'
        )
    return value


def _read_datasets_folder(path: Path) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"{path} is a folder, which the package 'datasets' reads, and it cannot be imported ({error}); "
            "install it with `pip install datasets`, or give a .jsonl file"
        ) from error
    try:
        # Into memory: a map of a file that another program rewrites would change under the run.
        dataset = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a folder that Dataset.save_to_disk wrote ({error}); or give a .jsonl file"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(sorted(dataset))
        raise DataError(
            f"{path}: holds splits ({splits}); name the folder of one, such as {path / sorted(dataset)[0]}"
        )
    for index, row in enumerate(dataset):
        # Arrow gives every row every column, so None is how a field that a record does not have comes back.
        fields = {key: value for key, value in row.items() if value is not None}
        yield Record(index=index, where=f"{path}, row {index}", fields=fields)


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
