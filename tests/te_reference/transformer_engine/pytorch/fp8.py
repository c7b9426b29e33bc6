"""FP8 is always off."""

from contextlib import AbstractContextManager, nullcontext


class FP8GlobalStateManager:
    """Says that FP8 is off, whoever asks."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def is_fp8_calibration() -> bool:
        return False


def _off(enabled: bool) -> AbstractContextManager[None]:
    if enabled:
        raise NotImplementedError("the reference of Transformer Engine has no FP8")
    return nullcontext()


def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: object = None, fp8_group: object = None,
    _graph: bool = False,
) -> AbstractContextManager[None]:  # fmt: skip
    return _off(enabled)


def fp8_model_init(
    enabled: bool = True, recipe: object = None, preserve_high_precision_init_val: bool = False
) -> AbstractContextManager[None]:
    return _off(enabled)
