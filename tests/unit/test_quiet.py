"""Routine warnings do not reach the terminal, and nothing else is lost with them."""

import logging
import re
import warnings

import pytest

from mtrl.parallel import quiet
from mtrl.parallel.device import current_device
from mtrl.parallel.quiet import LOG_LINES, WARNINGS, Noise

SAID = {
    "Transformer Engine and Apex are not installed. Falling back to Torch": "megatron.core.optimizer",
    "Apex is not installed. Falling back to Torch Norm": "megatron.core.models.backends",
    "full scope is deprecated. Use empty cuda_graph_scope": "megatron.core.transformer.transformer_config",
    "The .grad attribute of a Tensor that is not a leaf Tensor is": "megatron.core.optimizer.optimizer",
    "`torch.distributed.all_gather_into_tensor` is deprecated. Please": "torch.distributed.c10d_logger",
    "MimoModelConfig is experimental and still under": "megatron.core.models.mimo.config.base_configs",
    "invalid escape sequence '\\-'": "lib/python3.12/site-packages/megatron/core/kv_block_allocator",
}


def heard(message: str, category: type[Warning], module: str) -> bool:
    """Whether a warning gets through after `quiet.install`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.install()
        warnings.warn_explicit(message, category, filename=f"{module}.py", lineno=1, module=module)
    return bool(caught)


def noise_of(message: str) -> Noise:
    (found,) = [noise for noise in WARNINGS if re.match(noise.message, message)]
    return found


@pytest.mark.parametrize("message", SAID)
def test_what_is_said_at_every_start_is_not_heard(message: str) -> None:
    noise = noise_of(message)
    is_noise_here = noise.only_on in (None, current_device().kind)
    assert heard(message, noise.category, SAID[message]) != is_noise_here


def test_every_entry_is_tried() -> None:
    assert {noise_of(message).message for message in SAID} == {noise.message for noise in WARNINGS}


@pytest.mark.parametrize("message", SAID)
def test_the_same_from_elsewhere_and_anything_else_from_there_is_heard(message: str) -> None:
    category = noise_of(message).category
    assert heard(message, category, "my.module")
    assert heard("the loss is NaN", category, SAID[message])


@pytest.mark.parametrize("name", LOG_LINES)
def test_of_a_logger_only_the_routine_line_is_dropped(name: str, caplog: pytest.LogCaptureFixture) -> None:
    quiet.install()
    quiet.install()
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, logger=name):
        logger.addHandler(caplog.handler)
        logger.warning(LOG_LINES[name] + " and so on")
        logger.warning("gradients are NaN")
        logger.removeHandler(caplog.handler)
    assert {record.message for record in caplog.records} == {"gradients are NaN"}
