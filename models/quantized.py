"""Weights quantised in blocks, made bf16 while they are read: only the boxes that are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mtrl.models.boxes import Box, Range
from mtrl.models.hf_folder import SCALE_SUFFIX, Blocks, quantized_blocks, without_scales
from mtrl.models.sources import SafetensorsSource, TypedSource


class DequantizedSource:
    """A source whose fp8 weights have scales (see ``Blocks``), as one of bf16 weights without.

    A weight is its float32 value times its block's scale, rounded to bf16 once: what DeepSeek-V3's own
    conversion gives. Tensors without scales are passed on as they are.
    """

    def __init__(self, source: TypedSource, blocks: Blocks) -> None:
        self._source, self._blocks, self._stored = source, blocks, source.shapes()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight; scales are none."""
        return {name: self._stored[name] for name in without_scales(self._stored)}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of what `read` gives for every weight."""
        stored = self._source.dtypes()
        return {
            name: torch.bfloat16 if name + SCALE_SUFFIX in self._stored else stored[name]
            for name in without_scales(self._stored)
        }

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box``: bf16 where there are scales, else in the source's dtype."""
        stored = self._source.read(name, box)
        if name + SCALE_SUFFIX not in self._stored:
            return stored
        *outer, rows, columns = box.ranges
        high, wide = self._blocks.rows, self._blocks.columns
        grid = Box((*outer, _blocks_of(rows, high), _blocks_of(columns, wide)))
        scales = self._source.read(name + SCALE_SUFFIX, grid).float()
        scales = scales.index_select(-2, _block_index(rows, high))
        scales = scales.index_select(-1, _block_index(columns, wide))
        return (stored.float() * scales).bfloat16()


def _blocks_of(part: Range, size: int) -> Range:
    """The blocks that a range touches."""
    return part[0] // size, -(-part[1] // size)


def _block_index(part: Range, size: int) -> torch.Tensor:
    """Which of the touched blocks each element of a range lies in."""
    return torch.arange(*part) // size - part[0] // size


@contextmanager
def open_folder(folder: Path) -> Iterator[TypedSource]:
    """The weights of a Hugging Face folder, dequantised where they are quantised."""
    blocks = quantized_blocks(folder)
    with SafetensorsSource(folder) as files:
        yield files if blocks is None else DequantizedSource(files, blocks)
