"""Whether kernels can be built while a run goes on: Triton's own, and those of torch.compile."""

import importlib.util
import os
import shutil
from functools import cache

from mtrl.parallel.device import current_device


@cache
def can_build_kernels() -> bool:
    """On a GPU, with Triton, and the C compiler by which it makes each kernel's launcher."""
    if current_device().kind != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    # Triton's own order: triton/runtime/build.py.
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
