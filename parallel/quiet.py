"""Keep from the terminal what Megatron-Core and torch say at every start and nobody should act on.

Each entry names who says it and how it begins, so that anything else they say still comes through.
vLLM's own routine lines are ``rollout/vllm_process.py``'s.
"""

import logging
import warnings
from dataclasses import dataclass

from mtrl.parallel.device import current_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """One of Python's warnings: ``message`` and ``module`` are regular expressions for their starts.

    ``only_on`` is the kind of device where it is noise; None: on any.
    """

    message: str
    category: type[Warning]
    module: str
    why: str
    only_on: str | None = None


WARNINGS = (
    Noise(
        message=r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to",
        category=UserWarning,
        module=r"megatron\.",
        why="neither can be installed without a GPU; with one it is worth reading",
        only_on="cpu",
    ),
    Noise(
        message="full scope is deprecated",
        category=UserWarning,
        module=r"megatron\.core\.transformer",
        why="said of the default of a field that mtrl does not set",
    ),
    Noise(
        message=r"The \.grad attribute of a Tensor that is not a leaf",
        category=UserWarning,
        module=r"megatron\.core\.optimizer",
        why="the distributed optimizer clears gradients of its own shards, which are views",
    ),
    Noise(
        message=r"`torch\.distributed\.\w+` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed",
        why="Megatron-Core calls collectives by names that older torch needs",
    ),
    Noise(
        message="MimoModelConfig is experimental",
        category=UserWarning,
        module=r"megatron\.core\.models\.mimo",
        why="imported on the way, not used",
    ),
    Noise(
        message="invalid escape sequence",
        category=SyntaxWarning,
        module=r".*[./]megatron[./]",
        why="a docstring of Megatron-Core 0.19, compiled for the first time",
    ),
)

LOG_LINES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "torch._library.triton": "Triton not available",
}
"""Logger and how its routine line begins: advice to trainers' authors, CUDA and Triton looked for in vain."""


@dataclass(frozen=True, slots=True)
class _Unlike:
    """A logging filter that lets everything pass but lines that begin like this."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def install() -> None:
    """Silence `WARNINGS` and `LOG_LINES` in this process. Idempotent; call it before Megatron is imported."""
    for noise in WARNINGS:
        if noise.only_on in (None, current_device().kind):
            warnings.filterwarnings(
                "ignore", message=noise.message, category=noise.category, module=noise.module
            )
    for name, beginning in LOG_LINES.items():
        logger, unlike = logging.getLogger(name), _Unlike(beginning)
        if unlike not in logger.filters:
            logger.addFilter(unlike)
