"""What makes training repeat bit for bit on GPUs: variables read when CUDA starts, and torch's own switch.

On CPU the same seed and layout repeat without. Sampling is left out: vLLM shares the process, and some of its
kernels have no deterministic form, so the switch is on only while the trainer computes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mtrl.parallel.errors import ConfigError

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    # docs.nvidia.com/cuda/cublas, "Results reproducibility": one of two workspaces.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Transformer Engine's attention.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # NVLink SHARP sums in an order that varies; what Megatron-LM accepts with --deterministic-mode.
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
}
"""Variable -> the values that repeat, the one to set first."""


def check_environment() -> None:
    """Raise ConfigError where a variable that the user has set stands against determinism."""
    for name, values in ENVIRONMENT.items():
        given = os.environ.get(name, values[0])
        if given not in values:
            raise ConfigError(
                f"deterministic: true, but the environment has {name}={given}; unset it, or write {values[0]}"
            )


def set_environment() -> None:
    """Set what is not set; before CUDA starts, which reads it once."""
    for name, values in ENVIRONMENT.items():
        os.environ.setdefault(name, values[0])


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Have torch use deterministic kernels inside the block, if ``enabled``, and refuse those without one."""
    import torch  # the config is checked where there may be none

    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(enabled or before, warn_only=warned_only and not enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
