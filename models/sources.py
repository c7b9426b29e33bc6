"""Where weights come from, read box by box: the files of a Hugging Face folder, or a random generator."""

import hashlib
import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import safe_open

from mtrl.models.boxes import Box
from mtrl.models.files import SAFETENSORS_DTYPES
from mtrl.models.hf_folder import read_folder
from mtrl.models.safetensors_header import Header
from mtrl.parallel.errors import ModelError

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


class TensorSource(Protocol):
    """Names with shapes, and any box of any of them."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor there is."""
        ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box``, on the CPU, in the source's dtype."""
        ...


class TypedSource(TensorSource, Protocol):
    """A source that knows its tensors' dtypes before it reads them."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of what `read` gives for every tensor."""
        ...


class SafetensorsSource:
    """The tensors of a Hugging Face folder as they are stored, read slice by slice. A context manager.

    What lies in one piece in its file is read into memory of its own; files are mapped only for the rest, so
    that a process does not hold the pages of a whole folder.

    Raises:
        ModelError: the folder has no safetensors, or its index names a file that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[Path, Any] = {}
        self._where: dict[str, tuple[Path, Header]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for path, headers in read_folder(self.folder).items():
            self._where |= {name: (path, header) for name, header in headers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the folder."""
        return {name: header.shape for name, (_, header) in self._where.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor in the folder that torch has one for."""
        named = {name: TORCH_DTYPES.get(header.dtype) for name, (_, header) in self._where.items()}
        return {name: dtype for name, dtype in named.items() if dtype is not None}

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box`` of tensor ``name``."""
        path, header = self._where[name]
        dtype = TORCH_DTYPES.get(header.dtype)
        if dtype is not None and box.ranges[1:] == Box.full(header.shape).ranges[1:]:
            return read_rows(path, header, dtype, box)
        if path not in self._maps:
            self._maps[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        tensor: torch.Tensor = self._maps[path].get_slice(name)[box.slices]
        return tensor


def read_rows(path: Path, header: Header, dtype: torch.dtype, box: Box) -> torch.Tensor:
    """Elements of a tensor in a file that follow each other: ``box`` is whole in all dims but the first."""
    tensor = torch.empty(box.shape, dtype=dtype)
    start = box.ranges[0][0] * math.prod(header.shape[1:]) * dtype.itemsize if box.ranges else 0
    if tensor.numel():
        with path.open("rb", buffering=0) as file:
            file.seek(header.begin + start)
            left = memoryview(_bytes(tensor))
            while left:
                count = file.readinto(left)
                if not count:
                    raise ModelError(f"{path} was cut short while it was read")
                left = left[count:]
    return tensor


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()


class RandomSource:
    """Weights for training from scratch: norms are 1, biases and sinks 0, all else normal with mean 0.

    Each tensor has a generator of its own, seeded by (seed, name): the model does not depend on the
    layout, nor a tensor on the order of reading. ``std`` defaults to the config's
    ``initializer_range``, as transformers does.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, std: float) -> None:
        self._shapes, self.seed, self.std = shapes, seed, std

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model."""
        return dict(self._shapes)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box`` of tensor ``name``, float32."""
        shape = self._shapes[name]
        if name.endswith(("bias", "sinks")):
            return torch.zeros(box.shape)
        if len(shape) == 1:
            return torch.ones(box.shape)
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator)[box.slices] * self.std
