"""A reference of the part of Transformer Engine's public API that Megatron-Core subclasses, in plain torch.

It lets Megatron's real extension file (``megatron/core/extensions/transformer_engine.py``) and mtrl's backend
above it run on a machine without CUDA: constructor arguments, parameter names and shapes, the marks on
parameters, what is gathered and reduced over which group, and where a bias goes are those that Transformer
Engine documents. Each is a few lines of torch with autograd.

What it is not: it has none of Transformer Engine's kernels, dtypes, fusions or overlaps. Its FP8 is what the
recipes say, quantised and dequantised; in blocks the arithmetic is torch_native's, all of mtrl that is in it.
No number computed here says anything about the kernels' own; that needs a GPU. Nothing of mtrl imports it;
tests put its folder on ``sys.path`` in processes of their own.
"""

import importlib.util

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
# Of the releases whose API it follows; Megatron asks for it before it chooses arguments.
__version__ = "2.9.0"

if importlib.util.find_spec("transformer_engine_torch") is not None:
    raise ImportError("the reference stands for Transformer Engine where there is none; here there is one")
