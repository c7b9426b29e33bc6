"""Where weights come from, read box by box: the files of a Hugging Face folder, or a random generator."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import safe_open

from mtrl.models.boxes import Box
from mtrl.models.hf_folder import weight_files


class TensorSource(Protocol):
    """Names with shapes, and any box of any of them."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor there is."""
        ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box``, on the CPU, in the source's dtype."""
        ...


class SafetensorsSource:
    """The tensors of a Hugging Face folder as they are stored, read slice by slice. A context manager.

    Raises:
        ModelError: the folder has no safetensors, or its index names a file that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for file in weight_files(self.folder):
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            self._files[file.name] = handle
            self._where.update(dict.fromkeys(handle.keys(), file.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the folder."""
        return {
            name: tuple(self._files[file].get_slice(name).get_shape()) for name, file in self._where.items()
        }

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box`` of tensor ``name``."""
        tensor: torch.Tensor = self._files[self._where[name]].get_slice(name)[box.slices]
        return tensor


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
