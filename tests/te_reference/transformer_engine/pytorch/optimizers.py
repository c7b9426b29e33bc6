"""Adam as Transformer Engine's FusedAdam has it: the count of steps in the group, moments in any dtype."""

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW in fp32; moments are kept in their dtypes between steps. Without master weights of its own."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, adam_w_mode: bool = True,
        weight_decay: float = 0.0, amsgrad: bool = False, *, master_weights: bool = False,
        use_decoupled_grad: bool = False, capturable: bool = False, set_grad_none: bool | None = None,
        master_weight_dtype: torch.dtype = torch.float32, exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32, store_param_remainders: bool = False,
    ) -> None:  # fmt: skip
        assert adam_w_mode and bias_correction and not amsgrad and not master_weights and not capturable
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype
        }  # fmt: skip

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Zeros."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=self.name_to_dtype_map[name])

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """One step of every group."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param]:
                    self.initialize_state(param)
                self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), step = self.state[param], group["betas"], group["step"]
        assert param.grad is not None
        grad = param.grad.float()
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))


FusedSGD = torch.optim.SGD
