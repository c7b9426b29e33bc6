"""Keep the trainer's random states as they were while the engine runs in the same process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng_states() -> Iterator[None]:
    """Restore torch's (CPU and every CUDA device), Python's and numpy's global random states on exit."""
    torch_state = torch.get_rng_state()
    # A context that CUDA did not have before must not be created just to save its state.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
