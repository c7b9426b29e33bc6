"""Parameters in FP8. Each is a tensor of a nominal dtype without elements of it: whatever reads it reads what
its FP8 numbers stand for, and only `copy_` writes it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mtrl.models.backends.torch_native.fp8 import E4M3, SQUARE, quantise, spread
from transformer_engine.pytorch.fp8 import created_quantised

_aten = torch.ops.aten


class QuantizedTensor(Tensor):
    """What Megatron asks every parameter for."""

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """Its numbers in a dtype, its nominal one unless given."""
        raise NotImplementedError

    def quantize_(self, tensor: Tensor) -> None:
        """Become ``tensor``, rounded."""
        raise NotImplementedError

    def alias(self) -> "QuantizedTensor":
        """The same elements, without what autograd knows."""
        raise NotImplementedError

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten.detach.default:
            return args[0].alias()
        if func is _aten.copy_.default and isinstance(args[0], QuantizedTensor):
            args[0].quantize_(_plain(args[1]))
            return args[0]
        mutated = [
            each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments
        ]
        written = [arg for arg, is_written in zip(args, mutated, strict=False) if is_written]
        assert not [arg for arg in written if isinstance(arg, QuantizedTensor)], f"{func} would be lost"
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


class Float8BlockwiseQTensor(QuantizedTensor):
    """A weight in 128 x 128 blocks: ``_rowwise_data`` is uint8 of its shape, ``_rowwise_scale_inv`` of the
    blocks'.
    """

    _rowwise_data: Tensor
    _rowwise_scale_inv: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scales: Tensor, dtype: torch.dtype) -> "Float8BlockwiseQTensor":
        made: Float8BlockwiseQTensor = Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=dtype, device=data.device
        )
        made._rowwise_data, made._rowwise_scale_inv = data, scales
        return made

    @classmethod
    def of(cls, tensor: Tensor) -> "Float8BlockwiseQTensor":
        numbers, scales = quantise(tensor, SQUARE, E4M3)
        return cls(numbers.view(torch.uint8), scales, tensor.dtype)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        numbers = self._rowwise_data.view(torch.float8_e4m3fn).float()
        return (numbers * spread(self._rowwise_scale_inv, SQUARE, numbers.shape)).to(dtype or self.dtype)

    def quantize_(self, tensor: Tensor) -> None:
        numbers, scales = quantise(tensor.to(self.dtype), SQUARE, E4M3)
        self._rowwise_data.copy_(numbers.view(torch.uint8))
        self._rowwise_scale_inv.copy_(scales)

    def alias(self) -> "Float8BlockwiseQTensor":
        return Float8BlockwiseQTensor(self._rowwise_data, self._rowwise_scale_inv, self.dtype)


def new_weight(outputs: int, inputs: int, dtype: Any, device: Any) -> nn.Parameter:
    """A linear's weight, in FP8 inside `fp8_model_init`, with what it began as where that is asked for."""
    plain = torch.zeros(outputs, inputs, dtype=dtype, device=device)
    wanted = created_quantised()
    if wanted is None:
        return nn.Parameter(plain)
    recipe, keeps_initial = wanted
    assert recipe.float8_block_scaling(), "the reference keeps parameters in FP8 in blocks alone"
    weight: Any = nn.Parameter(Float8BlockwiseQTensor.of(plain))
    if keeps_initial:
        weight._high_precision_init_val = plain
        weight.get_high_precision_init_val = lambda: getattr(weight, "_high_precision_init_val", None)
        weight.clear_high_precision_init_val = lambda: vars(weight).pop("_high_precision_init_val", None)
    return weight  # type: ignore[no-any-return]


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        found: Tensor = weight.dequantize()
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def product_weight(weight: Tensor) -> Tensor:
    """What a product takes: numbers in blocks are the same when they are quantised once more."""
    if not isinstance(weight, QuantizedTensor):
        return weight
    found: Tensor = _Dequantised.apply(weight)  # type: ignore[no-untyped-call]
    return found
