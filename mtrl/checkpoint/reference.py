"""The reference policy of a run: its weights at the first rollout, kept once beside the checkpoints."""

import shutil
from pathlib import Path

import torch.distributed as dist

from mtrl.models.builder import Model
from mtrl.models.durable import sync_folder
from mtrl.models.files import FolderWriter
from mtrl.models.hf import write_hf
from mtrl.parallel.agreement import agree


def reference_path(checkpoints: Path) -> Path:
    """Where it stands: a Hugging Face folder."""
    return checkpoints / "reference"


def save_reference(model: Model, checkpoints: Path) -> None:
    """Write the model's weights as the reference, in place of one of a run that saved nothing after it.

    Collective over WORLD. Raises CheckpointError on all ranks, if any could not write.
    """
    target, partial = reference_path(checkpoints), checkpoints / ".reference.partial"
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    out = FolderWriter(partial)
    write_hf(model, out)
    agree(out.error)
    error: OSError | None = None
    if is_writer:
        try:
            sync_folder(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync_folder(checkpoints)
        except OSError as failed:
            error = failed
    agree(error)
