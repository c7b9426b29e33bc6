"""Data files to prompts and samples, and the order in which training visits them."""

from mtrl.data.load import Overlong, load_prompts, load_samples
from mtrl.data.order import DataCursor, epoch_order

__all__ = ["DataCursor", "Overlong", "epoch_order", "load_prompts", "load_samples"]
