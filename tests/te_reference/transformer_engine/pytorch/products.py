"""A linear's three products in FP8: of numbers quantised and dequantised, added up in fp32.

Legend: T tokens, O outputs, K inputs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtrl.models.backends.torch_native.fp8 import FORMATS, block_linear, requantised
from mtrl.models.hf_folder import Blocks
from mtrl.models.precision import Fp8
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch import fp8 as state

Quantise = Callable[[Tensor], Tensor]
"""Of a matrix whose columns a product contracts, fp32."""

_Ways = tuple[Quantise, Quantise, Quantise, Callable[[], None] | None]
"""For inputs, weights and gradients, and what follows the last product backwards."""

_ALONG = Blocks(rows=1, columns=32)


def fp8_linear(x: Tensor, weight_OK: Tensor, module: Any, gemm: int, num_gemms: int) -> Tensor:
    """``x @ weight.T`` with the recipe that is on; x [..., K], result [..., O] in x's dtype."""
    recipe = state.FP8GlobalStateManager.get_fp8_recipe()
    _check_dims(x, weight_OK, recipe)
    if recipe.float8_block_scaling():
        return block_linear(x, weight_OK, Fp8(gradients=_gradients(recipe)))
    flat_TK = x.reshape(-1, x.shape[-1])
    ways = _mx_ways(recipe) if recipe.mxfp8() else _delayed_ways(module, gemm, num_gemms)
    y_TO: Tensor = _Fp8Linear.apply(flat_TK, weight_OK, *ways)  # type: ignore[no-untyped-call]
    return y_TO.view(*x.shape[:-1], weight_OK.shape[0])


def _gradients(recipe: Any) -> Any:
    return recipe.fp8_format.gradients


def _check_dims(x: Tensor, weight_OK: Tensor, recipe: Recipe) -> None:
    """What Transformer Engine's products ask of shapes."""
    rows, columns = (32, 32) if recipe.mxfp8() else (8, 16)
    for tensor in (x, weight_OK):
        assert math.prod(tensor.shape[:-1]) % rows == 0 and tensor.shape[-1] % columns == 0, (
            f"FP8 takes dims of multiples of {rows} and {columns}, not {tuple(tensor.shape)}"
        )


def _mx_ways(recipe: Any) -> _Ways:
    def forwards(x: Tensor) -> Tensor:
        return requantised(x, _ALONG)

    def backwards(x: Tensor) -> Tensor:
        return requantised(x, _ALONG, FORMATS[_gradients(recipe)])

    return forwards, forwards, backwards, None


def _delayed_ways(module: Any, gemm: int, num_gemms: int) -> _Ways:
    state.check_not_recomputed()
    forwards = state.noted(module.fp8_meta["scaling_fwd"], "forward")
    group, is_last = state.FP8GlobalStateManager.get_fp8_group(), False
    if torch.is_grad_enabled():
        is_last = state.FP8GlobalStateManager.is_first_fp8_module()

    def backwards(x: Tensor) -> Tensor:
        return _per_tensor(state.noted(module.fp8_meta["scaling_bwd"], "backward"), gemm)(x)

    def finish() -> None:
        state.update_delayed("backward", group)

    inputs, weights = _per_tensor(forwards, gemm), _per_tensor(forwards, num_gemms + gemm)
    return inputs, weights, backwards, finish if is_last else None


def _per_tensor(states: state.DelayedState, number: int) -> Quantise:
    form = FORMATS[states.form]  # type: ignore[index]

    def quantise(x: Tensor) -> Tensor:
        states.see(number, x)
        scale = states.scale[number].clone()
        return (x.float() * scale).clamp(-form.largest, form.largest).to(form.dtype).float() / scale

    return quantise


class _Fp8Linear(torch.autograd.Function):
    """Quantised forwards, for both ways: scales may be others by the time of backward."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_OK: Tensor, inputs: Quantise, weights: Quantise, grads: Quantise,
        finish: Callable[[], None] | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(inputs(x_TK.T), weights(weight_OK.T))
        ctx.grads, ctx.finish, ctx.dtypes = grads, finish, (x_TK.dtype, weight_OK.dtype)
        return (inputs(x_TK) @ weights(weight_OK).T).to(x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_KT, weight_KO = ctx.saved_tensors
        dx_TK = (ctx.grads(dy_TO) @ weight_KO.T).to(ctx.dtypes[0])
        dweight_OK = (ctx.grads(dy_TO.T) @ x_KT.T).to(ctx.dtypes[1])
        if ctx.finish is not None:
            ctx.finish()
        return dx_TK, dweight_OK, None, None, None, None
