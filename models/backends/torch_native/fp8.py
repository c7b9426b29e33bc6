"""FP8 linears in blocks, as a reference: what a GPU's FP8 path must agree with, computed on any machine.

The recipe is DeepSeek-V3's (arXiv 2412.19437, section 3.3) as Transformer Engine's ``Float8BlockScaling`` has
it: every product multiplies e4m3 numbers and adds in fp32; activations and gradients share a scale over 128
numbers along the dim that the product contracts, weights over 128 x 128; scales are powers of two. The
product is one of fp32 over what the quantised numbers stand for, or, with ``products="scaled_mm"``, the sum
over blocks of torch's own FP8 products, where torch has them (on CPU for any shape). What a product needs in
another direction is quantised again from the original numbers, not from quantised ones.

Dims: T tokens, O outputs, K inputs; R rows and C columns of any matrix.

**How far from exact.** A block's scale is s, its largest magnitude a, the format's largest number m (448 in
e4m3, 57344 in e5m2). s is the least power of two with a / s <= m, so nothing is clipped and dividing by it
is exact. A number v becomes s * round(v / s), and rounding to p bits behind the leading one (3 in e4m3, 2 in
e5m2) is off by at most half of the last one's place:

- where v / s is normal, 2^-(p+1) of v: 2^-4 in e4m3, 2^-3 in e5m2;
- where it is subnormal, half of the least subnormal number times s: 2^-10 s in e4m3, 2^-17 s in e5m2.

As s < 2 a / m, the second is below a * 2^-17.8 in e4m3: an outlier blurs its block's small numbers by less.
So d(v) = max(2^-(p+1) |v|, h s) bounds the error of one number (`error_bound`), and that of a product of
x [T, K] and w [O, K], term by term, is

    |y' - y| <= sum_k |x| d(w) + d(x) |w| + d(x) d(w)  +  K 2^-24 sum_k (|x| + d(x)) (|w| + d(w))

the last of it fp32's own additions (`product_bound`). Without subnormals that is 2^-3 + 2^-8 of sum |x| |w|.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mtrl.models import hf_folder
from mtrl.models.hf_folder import Blocks
from mtrl.models.precision import Fp8, GradientFormat, Products

SQUARE = hf_folder.SQUARE
SIZE = SQUARE.rows
REFERENCE = Fp8()
ALONG_ROWS = Blocks(rows=1, columns=SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """An 8-bit float: ``relative`` is the most that rounding moves a normal number by, as a share of it,
    ``absolute`` a subnormal one.
    """

    dtype: torch.dtype
    largest: float
    relative: float
    absolute: float


E4M3 = Format(dtype=torch.float8_e4m3fn, largest=448.0, relative=2.0**-4, absolute=2.0**-10)
E5M2 = Format(dtype=torch.float8_e5m2, largest=57344.0, relative=2.0**-3, absolute=2.0**-17)
FORMATS: dict[GradientFormat, Format] = {"e4m3": E4M3, "e5m2": E5M2}
# Below it a scale's reciprocal overflows fp32.
_LEAST_SCALE = 2.0**-126


def quantise(x_RC: torch.Tensor, blocks: Blocks, form: Format = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    """``x_RC`` in the format, [R, C], and its blocks' scales, fp32 [ceil(R / rows), ceil(C / columns)].

    The last blocks of a dim may be smaller. Their product is the number again, as in DeepSeek's folders
    (`mtrl.models.quantized` reads what 128 x 128 blocks give here). A block that holds a number that is not
    finite becomes NaN as a whole.

    >>> stored, scales = quantise(torch.tensor([[1.0, 3.5, 900.0]]), ALONG_ROWS)
    >>> stored.tolist(), scales.tolist()
    ([[0.25, 0.875, 224.0]], [[4.0]])
    """
    scales = block_scales(x_RC, blocks, form)
    scaled = x_RC.float() / spread(scales, blocks, x_RC.shape)
    return scaled.clamp(-form.largest, form.largest).to(form.dtype), scales


def block_scales(x_RC: torch.Tensor, blocks: Blocks, form: Format = E4M3) -> torch.Tensor:
    """The least power of two for each block under which its numbers fit the format; 1 for zeros."""
    rows, columns = x_RC.shape
    high, wide = blocks.grid((rows, columns))
    padding = (0, wide * blocks.columns - columns, 0, high * blocks.rows - rows)
    grid = F.pad(x_RC.float().abs(), padding).view(high, blocks.rows, wide, blocks.columns)
    largest = grid.amax((1, 3))
    mantissa, exponent = torch.frexp(largest / form.largest)
    # frexp's mantissa is in [0.5, 1): at 0.5 the number is a power of two itself.
    scales = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int()).clamp_min(_LEAST_SCALE)
    # The quotient was rounded: a scale that it made too small by a factor of two is put right.
    scales = torch.where(scales * form.largest < largest, scales * 2, scales)
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    return torch.where(largest.isfinite(), scales, torch.full_like(scales, math.nan))


def spread(scales: torch.Tensor, blocks: Blocks, shape: torch.Size) -> torch.Tensor:
    """A scale for every number of a matrix of ``shape``."""
    tall = scales.repeat_interleave(blocks.rows, 0)[: shape[0]]
    return tall.repeat_interleave(blocks.columns, 1)[:, : shape[1]]


def requantised(x_RC: torch.Tensor, blocks: Blocks, form: Format = E4M3) -> torch.Tensor:
    """``x_RC`` quantised and dequantised, fp32."""
    stored, scales = quantise(x_RC, blocks, form)
    return stored.float() * spread(scales, blocks, x_RC.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocked:
    """A matrix in FP8, [R, K], that a product contracts over K."""

    stored: torch.Tensor
    scales: torch.Tensor
    blocks: Blocks

    @classmethod
    def of(cls, x_RK: torch.Tensor, blocks: Blocks, form: Format = E4M3) -> "_Blocked":
        stored, scales = quantise(x_RK, blocks, form)
        return cls(stored=stored, scales=scales, blocks=blocks)

    @property
    def transposed(self) -> "_Blocked":
        """Its square blocks are blocks of the transpose too."""
        assert self.blocks == SQUARE, "rows' blocks are no blocks of columns"
        return _Blocked(stored=self.stored.T, scales=self.scales.T, blocks=self.blocks)

    def dequantised(self) -> torch.Tensor:
        return self.stored.float() * spread(self.scales, self.blocks, self.stored.shape)

    def row_scales(self, block: int) -> torch.Tensor:
        """The scale of each row's numbers in block ``block`` of K, [R]."""
        return self.scales[:, block].repeat_interleave(self.blocks.rows)[: self.stored.shape[0]]


def _product(a: _Blocked, b: _Blocked, products: Products) -> torch.Tensor:
    """``a @ b.T``, [R of a, R of b] fp32."""
    if products == "dequantised":
        return a.dequantised() @ b.dequantised().T
    size = (a.stored.shape[0], b.stored.shape[0])
    total = torch.zeros(size, dtype=torch.float32, device=a.stored.device)
    for block, start in enumerate(range(0, a.stored.shape[1], SIZE)):
        part = slice(start, start + SIZE)
        total += F.scaled_mm(
            a.stored[:, part].contiguous(),
            b.stored[:, part].contiguous().T,
            a.row_scales(block)[:, None],
            F.ScalingType.RowWise,
            b.row_scales(block)[None, :],
            F.ScalingType.RowWise,
            output_dtype=torch.float32,
        )
    return total


def error_bound(x_RC: torch.Tensor, blocks: Blocks, form: Format = E4M3) -> torch.Tensor:
    """The most that `requantised` can be off by, number by number, float64: d(v) of the file's docstring."""
    scales = spread(block_scales(x_RC, blocks, form), blocks, x_RC.shape).double()
    return torch.maximum(form.relative * x_RC.double().abs(), form.absolute * scales)


def product_bound(
    a_RK: torch.Tensor, error_a_RK: torch.Tensor, b_CK: torch.Tensor, error_b_CK: torch.Tensor
) -> torch.Tensor:
    """The most that ``a' @ b'.T`` can be off from ``a @ b.T``, [R, C] float64, given the errors of both."""
    a, b = a_RK.double().abs(), b_CK.double().abs()
    from_operands = a @ error_b_CK.T + error_a_RK @ (b + error_b_CK).T
    from_additions = a_RK.shape[1] * 2.0**-24 * (a + error_a_RK) @ (b + error_b_CK).T
    return from_operands + from_additions


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: torch.Tensor, weight_OK: torch.Tensor, fp8: Fp8) -> torch.Tensor:
        ctx.save_for_backward(x_TK, weight_OK)
        ctx.fp8 = fp8
        y_TO = _product(_Blocked.of(x_TK, ALONG_ROWS), _Blocked.of(weight_OK, SQUARE), fp8.products)
        return y_TO.to(x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_TK, weight_OK = ctx.saved_tensors
        form, products = FORMATS[ctx.fp8.gradients], ctx.fp8.products
        dx_TK = dweight_OK = None
        if ctx.needs_input_grad[0]:
            weight_KO = _Blocked.of(weight_OK, SQUARE).transposed
            dx_TK = _product(_Blocked.of(dy_TO, ALONG_ROWS, form), weight_KO, products).to(x_TK.dtype)
        if ctx.needs_input_grad[1]:
            dy_OT, x_KT = _Blocked.of(dy_TO.T, ALONG_ROWS, form), _Blocked.of(x_TK.T, ALONG_ROWS)
            dweight_OK = _product(dy_OT, x_KT, products).to(weight_OK.dtype)
        return dx_TK, dweight_OK, None


def block_linear(x: torch.Tensor, weight_OK: torch.Tensor, fp8: Fp8 = REFERENCE) -> torch.Tensor:
    """``x @ weight.T`` through FP8 blocks, forwards and backwards; x [..., K], result [..., O] in x's dtype.

    The tokens of one call share blocks in the weight's gradient, so experts are called one by one.
    """
    flat = x.reshape(-1, x.shape[-1])
    apply: Any = _BlockLinear.apply  # torch gives it no types
    y_TO: torch.Tensor = apply(flat, weight_OK, fp8)
    return y_TO.view(*x.shape[:-1], weight_OK.shape[0])
