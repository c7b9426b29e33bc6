"""Write a step's weights as a Hugging Face folder, visible only once it is whole."""

import shutil
from pathlib import Path

import torch.distributed as dist

from mtrl.models.builder import Model
from mtrl.models.hf import export_hf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def save_checkpoint(model: Model, folder: Path, *, step: int, tokenizer: Path, keep_last: int | None) -> Path:
    """Write ``folder/step_N``: weights, config and tokenizer. Collective over WORLD.

    The folder is written under another name and renamed when every rank is done. ``keep_last`` then
    deletes the oldest others. Returns the checkpoint's path.
    """
    target = folder / f"step_{step:06d}"
    partial = folder / f".{target.name}.partial"
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    export_hf(model, partial)
    if is_writer:
        copy_tokenizer(tokenizer, partial)
        partial.rename(target)
        for old in sorted(folder.glob("step_*"))[: -keep_last if keep_last else 0]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from one Hugging Face folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
