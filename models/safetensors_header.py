"""The header of a safetensors file, refused unless it accounts for every byte. Pure: reads no weights.

A file is eight bytes of header length, the header in JSON, and the tensors' bytes one after the other.
Nothing in it can run: that is why no other format of weights is read.
"""

import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mtrl.parallel.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors library itself sets."""

MAX_DIMS = 64
"""More than torch has names for; the product of a million sizes would take hours."""

BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element, by safetensors' name of the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Shape and dtype (safetensors' name of it) of a tensor; it is bytes ``begin`` to ``end`` of its file."""

    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def read_headers(file: Path) -> dict[str, Header]:
    """Every tensor of a safetensors file, in the order of its header.

    The tensors fill the file without gap or overlap. A dtype that safetensors does not know today is returned
    like any other, with a size that cannot be checked: whether it matters is known where weights are chosen.

    Raises:
        ModelError: the file is no safetensors file, was cut short, or says what cannot be; the message names
            file and tensor.
    """
    try:
        # Opening what is no file, such as a named pipe, may never return.
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is no regular file")
        with file.open("rb") as stream:
            return _headers(stream)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{file} is no whole safetensors file: {reason}; download it again") from error


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 ``text``.

    ValueError for anything else, and for what readers of JSON understand differently: a key that occurs
    twice, NaN. RecursionError where it is nested too deeply.
    """
    if not text.startswith(b"{"):
        raise ValueError(f"it begins with {text[:8]!r}, not with a JSON object's brace")
    found = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    assert isinstance(found, dict)  # nothing else begins with a brace
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {double!r:.100} occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _headers(stream: BinaryIO) -> dict[str, Header]:
    num_bytes = os.fstat(stream.fileno()).st_size
    if num_bytes < 8:
        raise ValueError(f"it has {num_bytes} bytes, and the length of its header takes 8")
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > min(num_bytes - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"its header has {length} bytes, the file {num_bytes}, and no header more than {MAX_HEADER_BYTES}"
        )
    entries = parse_object(stream.read(length))
    _check_metadata(entries.pop("__metadata__", {}))
    start = 8 + length
    headers = {name: _header(name, entry, start, num_bytes) for name, entry in entries.items()}
    _check_filled(headers, start, num_bytes)
    return headers


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ is {metadata!r:.100}, and must map strings to strings")


def _header(name: str, entry: object, start: int, num_bytes: int) -> Header:
    """One tensor's entry, checked alone; the tensors' bytes begin at ``start``."""
    # A terminal obeys control characters, and names stand in messages.
    if not name.isprintable() or not name:
        raise ValueError(f"a tensor has the name {name!r:.100}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name:.100}: {entry!r:.100} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype.isprintable():
        raise ValueError(f"tensor {name:.100}: dtype {dtype!r:.100} is no name")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"tensor {name:.100}: shape {shape!r:.100} is no list of up to {MAX_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name:.100}: data_offsets {offsets!r:.100} are no begin and end")
    begin, end = (start + offset for offset in offsets)
    if end > num_bytes:
        raise ValueError(f"tensor {name:.100} ends at byte {end}, the file at {num_bytes}")
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise ValueError(
            f"tensor {name:.100}: {dtype} of shape {shape!r:.100} has other than {end - begin} bytes"
        )
    return Header(shape=tuple(shape), dtype=dtype, begin=begin, end=end)


def _are_counts(value: object) -> bool:
    """Whether it is a list of integers that sizes can be; ``true`` is none, though Python says so."""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)


def _check_filled(headers: Mapping[str, Header], start: int, num_bytes: int) -> None:
    """Each byte from ``start`` to the end of the file belongs to one tensor."""
    reached, last = start, "the header"
    for name in sorted(headers, key=lambda name: (headers[name].begin, headers[name].end)):
        here = headers[name]
        if here.begin != reached:
            what = "overlap" if here.begin < reached else f"leave {here.begin - reached} bytes between them"
            raise ValueError(f"{last:.100} and tensor {name:.100} {what}")
        reached, last = here.end, f"tensor {name}"
    if reached != num_bytes:
        raise ValueError(f"the file has {num_bytes} bytes and its header says {reached}")
