"""FP8 training: which products run in it, and how. Pure; imports neither torch nor Megatron.

Norms, embeddings, routers and the output layer stay bf16, masters and moments fp32, so that a run starts from
any bf16 checkpoint and writes one. What changes is the arithmetic of the layers' linears and, if wanted, how
their weights are kept.
"""

from dataclasses import dataclass
from typing import Literal

Recipe = Literal["fp8_blockwise", "fp8_delayed", "mxfp8"]
"""``fp8_blockwise``: scales of 1 x 128 numbers, weights' of 128 x 128, as DeepSeek-V3. ``fp8_delayed``: one
scale a tensor, from earlier steps. ``mxfp8``: one scale for 32 numbers, Blackwell's own."""

GradientFormat = Literal["e4m3", "e5m2"]
Products = Literal["dequantised", "scaled_mm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """How linears compute. ``gradients`` is the format of what comes back; all else is e4m3. ``products`` of
    torch_native: of dequantised numbers, or torch's own of FP8 numbers; the same but for rounding in fp32.

    The first ``bf16_first_layers`` and the last ``bf16_last_layers`` of the model keep bf16. With
    ``parameters`` the other layers' weights are kept in FP8, and bf16 of them nowhere.
    """

    recipe: Recipe = "fp8_blockwise"
    gradients: GradientFormat = "e4m3"
    products: Products = "dequantised"
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    parameters: bool = False

    def covers(self, layer: int, num_layers: int) -> bool:
        """Whether the linears of (0-based) ``layer`` run in FP8.

        >>> [Fp8(bf16_first_layers=1, bf16_last_layers=2).covers(layer, 5) for layer in range(5)]
        [False, True, True, False, False]
        """
        return self.bf16_first_layers <= layer < num_layers - self.bf16_last_layers
