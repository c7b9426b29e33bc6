"""Names of the router's kernels, which Megatron imports from release 2.7 on; mtrl asks for none of them."""

from typing import Any, NoReturn


def _no_kernel(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("the reference of Transformer Engine has no router kernels")


fused_topk_with_score_function = fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = _no_kernel
