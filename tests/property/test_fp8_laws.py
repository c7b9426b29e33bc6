"""FP8 blocks keep within what their format allows, whatever the shapes, magnitudes and outliers."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtrl.models.backends.torch_native.fp8 import (
    ALONG_ROWS,
    E4M3,
    E5M2,
    FORMATS,
    SQUARE,
    Format,
    block_linear,
    block_scales,
    error_bound,
    product_bound,
    quantise,
    requantised,
)
from mtrl.models.boxes import Box
from mtrl.models.hf_folder import SCALE_SUFFIX, Blocks
from mtrl.models.precision import Fp8, GradientFormat, Products
from mtrl.models.quantized import DequantizedSource

pytestmark = pytest.mark.one_stack

sizes = st.sampled_from([1, 2, 127, 128, 129, 200, 256, 300]) | st.integers(1, 300)
layouts = st.sampled_from([ALONG_ROWS, SQUARE])
formats = st.sampled_from([E4M3, E5M2])


@st.composite
def matrices(draw: st.DrawFn, rows: int | None = None, columns: int | None = None) -> Tensor:
    """A matrix: normal numbers of any magnitude, some with outliers, zeros, or magnitudes of many orders."""
    shape = (rows or draw(sizes), columns or draw(sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-60, 40))
    kind = draw(st.sampled_from(["plain", "outliers", "zeros", "orders"]))
    if kind == "outliers":
        x[torch.rand(shape, generator=generator) < 0.02] *= 2.0 ** draw(st.integers(5, 20))
    elif kind == "zeros":
        x[torch.rand(shape, generator=generator) < 0.5] = 0.0
    elif kind == "orders":
        x *= torch.exp2(torch.randint(-20, 20, shape, generator=generator).float())
    return x


@settings(deadline=None, max_examples=60)
@given(x=matrices(), blocks=layouts, form=formats)
@example(x=torch.zeros(3, 130), blocks=ALONG_ROWS, form=E4M3)
@example(x=torch.full((2, 5), 448.0), blocks=SQUARE, form=E4M3)
@example(
    x=torch.tensor([[math.nextafter(448.0, 449.0)] * 2]).float() * (1 + 2**-23), blocks=SQUARE, form=E4M3
)
@example(x=torch.tensor([[1e-45, 1e-38, 3e38]]), blocks=ALONG_ROWS, form=E4M3)
@example(x=torch.tensor([[1e-45, 1e-40]]), blocks=ALONG_ROWS, form=E5M2)
def test_no_number_is_off_by_more_than_its_bound(x: Tensor, blocks: Blocks, form: Format) -> None:
    error = (requantised(x, blocks, form).double() - x.double()).abs()
    assert (error <= error_bound(x, blocks, form)).all()


@settings(deadline=None, max_examples=40)
@given(x=matrices(), blocks=layouts, form=formats)
def test_scales_are_the_least_powers_of_two_under_which_a_block_fits(
    x: Tensor, blocks: Blocks, form: Format
) -> None:
    stored, scales = quantise(x, blocks, form)
    assert scales.shape == blocks.grid(tuple(x.shape)) and stored.shape == x.shape
    assert (torch.frexp(scales)[0] == 0.5).all()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = x[row * blocks.rows :, column * blocks.columns :][: blocks.rows, : blocks.columns]
            largest, scale = float(block.abs().max()), float(scales[row, column])
            assert largest <= scale * form.largest
            assert largest > scale / 2 * form.largest or scale in (1.0, 2.0**-126)


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_the_bound_is_reached(form: Format) -> None:
    """A looser format than the docstring's would break the law above; a tighter one this."""
    # Half-way between 1 and the next number, and half-way between 0 and the least subnormal one.
    middle = 1 + form.relative
    x = torch.tensor([[form.largest, middle * (1 - 2**-20), form.absolute * (1 - 2**-20)]])
    error = (requantised(x, ALONG_ROWS, form) - x).abs()[0]
    assert error[1] > 0.99 * form.relative and error[2] > 0.99 * form.absolute
    assert torch.finfo(form.dtype).max == form.largest


@settings(deadline=None, max_examples=40)
@given(data=st.data(), num_tokens=sizes, num_inputs=sizes, num_outputs=sizes)
def test_products_and_their_gradients_keep_within_the_bound(
    data: st.DataObject, num_tokens: int, num_inputs: int, num_outputs: int
) -> None:
    x = data.draw(matrices(num_tokens, num_inputs)).requires_grad_()
    w = data.draw(matrices(num_outputs, num_inputs)).requires_grad_()
    dy = data.draw(matrices(num_tokens, num_outputs))
    gradients: GradientFormat = data.draw(st.sampled_from(["e4m3", "e5m2"]))
    products: Products = data.draw(st.sampled_from(["dequantised", "scaled_mm"]))
    y = block_linear(x, w, Fp8(gradients=gradients, products=products))
    y.backward(dy)
    assert x.grad is not None and w.grad is not None
    x, dx, w, dw = x.detach(), x.grad, w.detach(), w.grad
    form = FORMATS[gradients]
    error_w = error_bound(w, SQUARE)
    within(y, x, error_bound(x, ALONG_ROWS), w, error_w)
    within(dx, dy, error_bound(dy, ALONG_ROWS, form), w.T, error_w.T)
    error_dy, error_x = error_bound(dy.T, ALONG_ROWS, form), error_bound(x.T, ALONG_ROWS)
    within(dw, dy.T, error_dy, x.T, error_x)


def within(found: Tensor, a: Tensor, error_a: Tensor, b: Tensor, error_b: Tensor) -> None:
    wanted = a.double() @ b.double().T
    # fp32 itself has no numbers below 2^-149: each of the K products may lose as much.
    bound = product_bound(a, error_a, b, error_b) + a.shape[1] * 2.0**-149
    finite = wanted.abs() + bound < torch.finfo(torch.float32).max
    assert ((found.detach().double() - wanted).abs() <= bound)[finite].all()


@settings(deadline=None, max_examples=20)
@given(x=matrices())
def test_weights_quantised_here_are_read_as_deepseeks_blocks(x: Tensor) -> None:
    stored, scales = quantise(x, SQUARE)

    class Memory:
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {"w": tuple(x.shape), "w" + SCALE_SUFFIX: tuple(scales.shape)}

        def dtypes(self) -> dict[str, torch.dtype]:
            return {"w": stored.dtype, "w" + SCALE_SUFFIX: scales.dtype}

        def read(self, name: str, box: Box) -> Tensor:
            return (stored if name == "w" else scales)[box.slices]

    whole = Box(((0, x.shape[0]), (0, x.shape[1])))
    read = DequantizedSource(Memory(), SQUARE).read("w", whole)
    assert torch.equal(read, requantised(x, SQUARE).bfloat16())


@settings(deadline=None, max_examples=20)
@given(x=matrices(), exponent=st.integers(-20, 20), form=formats)
def test_scaling_by_a_power_of_two_scales_the_result(x: Tensor, exponent: int, form: Format) -> None:
    assert torch.equal(
        requantised(x * 2.0**exponent, ALONG_ROWS, form), requantised(x, ALONG_ROWS, form) * 2.0**exponent
    )


def test_a_block_with_a_number_that_is_not_finite_becomes_nan_and_no_other() -> None:
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = math.inf, math.nan
    found = requantised(x, ALONG_ROWS)
    assert found[0, :128].isnan().all() and found[1, 128:].isnan().all()
    assert (found[0, 128:] == 1).all() and (found[1, :128] == 1).all()
    assert block_scales(x, ALONG_ROWS).isnan().tolist() == [[True, False], [False, True]]


def test_an_outlier_costs_its_own_block_only() -> None:
    x = torch.full((1, 256), 2.0**-12)
    x[0, 0] = 448.0
    found = requantised(x, ALONG_ROWS)
    assert (found[0, 1:128] == 0).all() and torch.equal(found[0, 128:], x[0, 128:])
