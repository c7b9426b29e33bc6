"""The states of all random generators of a process, as tensors."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtrl.parallel.device import current_device

from megatron.core import tensor_parallel

_TRACKER = "megatron."


def rng_tensors() -> dict[str, Tensor]:
    """Python's, NumPy's and torch's generators; on a GPU its own and those of Megatron's tracker too."""
    version, words, gauss = random.getstate()
    assert version == 3
    numpy_state: Any = np.random.get_state(legacy=False)
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy.position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]]),
        "numpy.gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if current_device().kind == "cuda":
        found["cuda"] = torch.cuda.get_rng_state()
        states = tensor_parallel.get_cuda_rng_tracker().get_states()
        found |= {_TRACKER + name: state for name, state in states.items() if isinstance(state, Tensor)}
    return found


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `rng_tensors` gave, on a process of the same kind of device."""
    gauss = tensors["python.gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy.position"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": float(tensors["numpy.gauss"]),
        }
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and current_device().kind == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"])
        states = {
            name.removeprefix(_TRACKER): state for name, state in tensors.items() if name.startswith(_TRACKER)
        }
        tensor_parallel.get_cuda_rng_tracker().set_states(states)
