"""Rows of zeros behind each expert's tokens, as many as FP8's products ask for, and their removal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class _Rows(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def padded(self, m_splits: list[int]) -> list[int]:
        assert len(m_splits) == self.num_gemms
        size = self.align_size or (32 if FP8GlobalStateManager.get_fp8_recipe().mxfp8() else 16)
        return [-(-rows // size) * size for rows in m_splits]


class Fp8Padding(_Rows):
    """To multiples of 16 rows an expert, of 32 under `MXFP8BlockScaling`."""

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        sizes = self.padded(m_splits)
        parts = zip(inp.split(m_splits), sizes, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, size - len(part))) for part, size in parts]), sizes


class Fp8Unpadding(_Rows):
    """The rows that were there; ``m_splits`` are their numbers."""

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        parts = inp.split(self.padded(m_splits))
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])
