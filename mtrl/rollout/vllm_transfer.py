"""mtrl's push as a weight transfer engine of vLLM's own registry.

vLLM's worker keeps the session (started, updating, finished; which model is the target; adapters), its
scheduler is paused around it; what moves the weights is mtrl's, given for each update as a function: trainer
and engine share a process. Imports vLLM: import it when an engine is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

BACKEND = "mtrl"


@dataclass
class NothingToInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Trainer and engine are in one process: there is no connection to make."""


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """``write`` changes the live weights in place."""

    write: Callable[[], None]


class InProcessTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Runs what it is given, on weights in the layout of the kernels, and then what is derived from them."""

    init_info_cls, update_info_cls = NothingToInit, Update
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.derive: Callable[[], None] = lambda: None

    def init_transfer_engine(self, init_info: NothingToInit) -> None:
        """Nothing: see `NothingToInit`."""

    def start_weight_update(self) -> None:
        """Nothing: weights are written in place, as kernels read them."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Write. vLLM's own waits for an accelerator after, which a CPU build has none of; our caller
        does.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        """Write."""
        update_info.write()

    def finish_weight_update(self) -> None:
        """Compute what the forward pass reads besides."""
        self.derive()

    def shutdown(self) -> None:
        """Nothing is held."""


def transfer_config() -> Any:
    """What an engine is built with to take mtrl's updates."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, InProcessTransfer)
    return WeightTransferConfig(backend=BACKEND)
