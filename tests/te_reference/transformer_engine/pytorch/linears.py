"""Linears, alone, behind a norm, and one for each expert.

``parallel_mode`` ``"column"`` shards the output features over the group, ``"row"`` the input features, None
nothing. With ``return_bias`` the bias is returned, not added. Arguments that only kernels or initialisation
read are taken and not used; unknown ones are errors. With overlap (``ub_*``) nothing is computed otherwise,
but there must be user buffers that fit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch import user_buffers
from transformer_engine.pytorch.distributed import into_columns, out_of_rows
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, make_states
from transformer_engine.pytorch.products import fp8_linear
from transformer_engine.pytorch.tensor import new_weight, product_weight


class TransformerEngineBaseModule(nn.Module):
    """What all modules have besides parameters: an extra state, of no bytes outside FP8. In FP8 Transformer
    Engine's is pickled, which nothing of mtrl reads or writes.
    """

    fp8 = fp8_calibration = False
    ub_name: str | None = None
    overlaps = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def get_extra_state(self) -> Tensor:
        assert not self.fp8, "the reference pickles nothing"
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or state.numel() == 0, "the reference has no FP8 state"

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Make the scales that the recipe which is on wants kept, unless they are there."""
        if FP8GlobalStateManager.is_fp8_enabled():
            self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()
            if self.fp8_meta["recipe"].delayed():
                make_states(self.fp8_meta, num_gemms)


class _Parallel(TransformerEngineBaseModule):
    """A linear of one or several products, sharded or not."""

    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool, tp_group: Any, tp_size: int,
        bias: bool, return_bias: bool, params_dtype: torch.dtype | None, parallel_mode: str | None,
        device: Any, fuse_wgrad_accumulation: bool, delay_wgrad_compute: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        assert parallel_mode in ("row", "column", None), parallel_mode
        assert not fuse_wgrad_accumulation and not delay_wgrad_compute, "not in the reference"
        assert tp_size == 1 or tp_group.size() == tp_size, "a group as large as the size"
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias = bias, return_bias
        self._options = {"dtype": params_dtype, "device": device}

    def _new_weight(self) -> nn.Parameter:
        weight = new_weight(self.out_features, self.in_features, **self._options)
        _mark(weight, 1 if self.parallel_mode == "row" else 0)
        return weight

    def _new_bias(self) -> nn.Parameter | Tensor:
        if not self.use_bias:
            return torch.empty(0, **self._options)
        bias = nn.Parameter(torch.zeros(self.out_features, **self._options))
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif self.parallel_mode == "column":
            _mark(bias, 0)
        return bias

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor, gemm: int = 0, num_gemms: int = 1) -> Any:
        self.fp8, weight = FP8GlobalStateManager.is_fp8_enabled(), product_weight(weight)
        self.init_fp8_metadata(num_gemms)
        is_parallel = self.tp_size > 1
        if is_parallel and self.parallel_mode == "column":
            x = into_columns(x, self.tp_group, sequence_parallel=self.sequence_parallel)
            self._take_buffers(x)
        out = fp8_linear(x, weight, self, gemm, num_gemms) if self.fp8 else F.linear(x, weight)
        if is_parallel and self.parallel_mode == "row":
            self._take_buffers(out)
            out = out_of_rows(out, self.tp_group, sequence_parallel=self.sequence_parallel)
        if self.return_bias:
            return out, bias
        return out + bias if self.use_bias else out

    def _take_buffers(self, travelling: Tensor) -> None:
        if self.overlaps and self.sequence_parallel:
            user_buffers.take(travelling, self.ub_name, tp_size=self.tp_size, fp8=self.fp8)


class Linear(_Parallel):
    """``x @ weight.T``; ``weight`` is [out, in] of this rank, ``bias`` [out]."""

    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None, init_method: Callable[..., Any] | None = None,
        bias: bool = True, return_bias: bool = False, params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None, parameters_split: None = None, device: Any = "cuda",
        ub_overlap_ag: bool = False, ub_overlap_rs: bool = False, ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False, ub_bulk_wgrad: bool = False, ub_name: str | None = None,
        rng_tracker_name: str | None = None, delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None, save_original_input: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, params_dtype,
            parallel_mode, device, fuse_wgrad_accumulation, delay_wgrad_compute,
        )  # fmt: skip
        self.save_original_input = save_original_input
        self.ub_name = ub_name
        self.overlaps = (
            ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad or ub_bulk_dgrad or ub_bulk_wgrad
        )
        self.weight = self._new_weight()
        self.bias = self._new_bias()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._product(inp, self.weight, self.bias)


class LayerNormLinear(_Parallel):
    """A linear of the normalised input. ``layer_norm_weight`` [in], the norm's, is whole on all ranks."""

    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None, init_method: Callable[..., Any] | None = None,
        bias: bool = True, normalization: str = "LayerNorm", return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None,
        return_layernorm_output: bool = False, return_layernorm_output_gathered: bool = False,
        parameters_split: None = None, zero_centered_gamma: bool = False, device: Any = "cuda",
        ub_overlap_ag: bool = False, ub_overlap_rs: bool = False, ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False, ub_bulk_dgrad: bool = False, ub_name: str | None = None,
        delay_wgrad_compute: bool = False, symmetric_ar_type: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, params_dtype,
            parallel_mode, device, fuse_wgrad_accumulation, delay_wgrad_compute,
        )  # fmt: skip
        assert normalization == "RMSNorm" and not zero_centered_gamma, "not in the reference"
        assert not return_layernorm_output, "not in the reference"
        self.eps, self.normalization = eps, normalization
        self.ub_name = ub_name
        self.overlaps = (
            ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad or ub_bulk_dgrad or ub_bulk_wgrad
        )
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **self._options))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_bias = None
        self.weight = self._new_weight()
        self.bias = self._new_bias()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normal = F.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps)
        return self._product(normal, self.weight, self.bias)


class GroupedLinear(_Parallel):
    """Linear i of rows that lie together: ``weight0``, ``weight1``, ... and ``bias0``, ..."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None, rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None, bias: bool = True, return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None, device: Any = "cuda",
        ub_overlap_rs: bool = False, ub_overlap_ag: bool = False, ub_name: str | None = None,
        delay_wgrad_compute: bool = False, save_original_input: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, params_dtype,
            parallel_mode, device, fuse_wgrad_accumulation, delay_wgrad_compute,
        )  # fmt: skip
        assert tp_size == 1, "Megatron's dispatcher does the communication of experts"
        self.num_gemms, self.save_original_input = num_gemms, save_original_input
        for number in range(num_gemms):
            setattr(self, f"weight{number}", self._new_weight())
            setattr(self, f"bias{number}", self._new_bias())

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        assert len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        numbered = enumerate(inp.split(m_splits))
        parts = [
            self._product(x, getattr(self, f"weight{i}"), getattr(self, f"bias{i}"), i, self.num_gemms)
            for i, x in numbered
        ]
        if self.return_bias:
            return torch.cat([out for out, _ in parts]), [bias for _, bias in parts]
        return torch.cat(parts)


def _mark(parameter: Any, dim: int) -> None:
    """Megatron's marks of a sharded parameter, which Transformer Engine sets whatever the group's size."""
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1
