"""FP8 recipes: which numbers share a scale, and where it comes from."""

import enum
from dataclasses import dataclass


class Format(enum.Enum):
    """Of numbers in FP8: forwards always e4m3; HYBRID has gradients in e5m2."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"

    @property
    def gradients(self) -> str:
        return "e4m3" if self is Format.E4M3 else "e5m2"


class Recipe:
    """What the recipes have in common."""

    @classmethod
    def delayed(cls) -> bool:
        return issubclass(cls, DelayedScaling)

    @classmethod
    def mxfp8(cls) -> bool:
        return issubclass(cls, MXFP8BlockScaling)

    @classmethod
    def float8_block_scaling(cls) -> bool:
        return issubclass(cls, Float8BlockScaling)


class DelayedScaling(Recipe):
    """One scale a tensor, from the largest magnitudes of earlier passes."""

    def __init__(
        self, margin: int = 0, fp8_format: Format = Format.HYBRID, amax_history_len: int = 1024,
        amax_compute_algo: str = "max", reduce_amax: bool = True, fp8_dpa: bool = False,
        fp8_mha: bool = False, override_linear_precision: tuple[bool, bool, bool] = (False, False, False),
        params_dtype: object = None, device: object = None,
    ) -> None:  # fmt: skip
        """The last two are no fields: Transformer Engine's recipes drop what they do not know, and Megatron
        gives this one what it gives modules.
        """
        assert not fp8_dpa and not fp8_mha and not any(override_linear_precision), "not in the reference"
        assert amax_compute_algo in ("max", "most_recent")
        self.margin, self.fp8_format, self.reduce_amax = margin, fp8_format, reduce_amax
        self.amax_history_len, self.amax_compute_algo = amax_history_len, amax_compute_algo


@dataclass
class _Blocks(Recipe):
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False

    def __post_init__(self) -> None:
        assert not self.fp8_dpa, "not in the reference"


class Float8CurrentScaling(_Blocks):
    """A name that Megatron chooses from; mtrl asks for the others."""

    def __post_init__(self) -> None:
        raise NotImplementedError("not in the reference of Transformer Engine")


class Float8BlockScaling(_Blocks):
    """A power of two for 1 x 128 numbers of activations and gradients, for 128 x 128 of weights."""


class MXFP8BlockScaling(_Blocks):
    """A power of two for 32 numbers along the dim that a product contracts."""
