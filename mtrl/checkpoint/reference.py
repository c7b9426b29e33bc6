"""The reference policy of a run: its weights at the first rollout, kept once beside the checkpoints."""

import shutil
from pathlib import Path

import torch.distributed as dist

from mtrl.checkpoint.format import MANIFEST, REFERENCE, Manifest
from mtrl.checkpoint.load import damage
from mtrl.models.builder import Model
from mtrl.models.durable import FileRecord, sync_folder, write_file
from mtrl.models.files import FolderWriter
from mtrl.models.hf import load_hf, write_hf
from mtrl.parallel.agreement import agree, gather_json
from mtrl.parallel.errors import CheckpointError


def reference_path(checkpoints: Path) -> Path:
    """Where it stands: a Hugging Face folder."""
    return checkpoints / REFERENCE


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
    everyones = gather_json([record.to_json() for record in out.records])
    error: OSError | None = None
    if is_writer:
        try:
            files = tuple(FileRecord(**each) for rank in everyones for each in rank)
            write_file(partial / MANIFEST, Manifest(step=0, files=files).to_json())
            sync_folder(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync_folder(checkpoints)
        except OSError as failed:
            error = failed
    agree(error)


def load_reference(model: Model, checkpoints: Path) -> None:
    """Fill the model with the reference's weights, verified. Collective over WORLD.

    Raises:
        CheckpointError: it is damaged.
    """
    folder = reference_path(checkpoints)
    if wrong := damage(folder):
        raise CheckpointError(
            f"{folder} is damaged: {'; '.join(wrong)}. It is the policy at the run's first rollout, which "
            "the KL penalty compares with: bring it back, or go on with algorithm.kl_coef=0"
        )
    load_hf(model, folder)
