"""Write a checkpoint: every rank its own files, made visible by one rename when all are on disk.

A rank that cannot write (a full disk) still takes part in what is collective; then all ranks raise the same
error, what was written is deleted, and the checkpoints before it are as they were.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.checkpoint.folder import partial_path, point_latest, prune, publish, step_path
from mtrl.checkpoint.format import (
    COPIED_FILES,
    MANIFEST,
    RUN_CONFIG,
    STATE,
    Manifest,
    RunState,
    json_bytes,
    rank_file,
)
from mtrl.checkpoint.fp8_scales import KIND, scale_tensors
from mtrl.checkpoint.optimizer_state import OptimizerState
from mtrl.checkpoint.rng import rng_tensors
from mtrl.models.builder import Model
from mtrl.models.durable import FileRecord, sync_folder, write_file
from mtrl.models.files import FileSink, FolderWriter, PutTensor, TensorKind
from mtrl.models.hf import write_hf
from mtrl.parallel.agreement import agree, gather_json
from mtrl.parallel.errors import CheckpointError

BUCKET_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint is made of. ``optimizer`` is Megatron's, None to leave its state out; ``config`` is
    the run's, as JSON; ``tokenizer`` the folder its files are in.
    """

    model: Model
    optimizer: Any
    state: RunState
    config: Mapping[str, Any]
    tokenizer: Path


def write_contents(contents: Contents, out: FileSink) -> None:
    """Give ``out`` this rank's files. Collective over WORLD."""
    model, state = contents.model, contents.state
    rank, world_size = model.groups.rank, model.groups.layout.world_size
    write_hf(model, out, bucket_bytes=BUCKET_BYTES)
    if contents.optimizer is not None:
        owned = OptimizerState.of(model, contents.optimizer).owned()
        _write_tensors(out, rank_file("optimizer", rank, world_size), owned)
    _write_tensors(out, rank_file("rng", rank, world_size), rng_tensors())
    if scales := scale_tensors(model):
        _write_tensors(out, rank_file(KIND, rank, world_size), scales)
    if rank == 0:
        for name in COPIED_FILES:
            if (contents.tokenizer / name).is_file():
                out.write(name, (contents.tokenizer / name).read_bytes())
        out.write(RUN_CONFIG, json_bytes(contents.config))
        out.write(STATE, state.to_json())


def _write_tensors(out: FileSink, name: str, tensors: Mapping[str, Tensor]) -> None:
    with out.tensors(name, {key: (each.dtype, tuple(each.shape)) for key, each in tensors.items()}) as put:
        for key, tensor in tensors.items():
            put(key, tensor)


class Checkpointer:
    """Saves the checkpoints of one run into ``folder``.

    With ``asynchronous``, `save` copies what this rank is to write and returns; a thread writes it. There is
    one such copy at most: the next `save` waits for it. Made on all ranks together.
    """

    def __init__(
        self, folder: Path, *, keep_last: int | None, keep_every: int | None, asynchronous: bool = False
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        # A group of the thread's own: two threads must not take turns on one.
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        self._asynchronous, self._thread = asynchronous, Thread()
        self._failure: Exception | None = None

    def save(self, contents: Contents) -> Path:
        """Write the checkpoint of ``contents.state.step``; its path, also when it is already there.

        Collective over WORLD.

        Raises:
            CheckpointError: on all ranks, if any could not write this one or, with ``asynchronous``, the one
                before. The checkpoints before it are whole.
        """
        self.wait()
        step, target = contents.state.step, step_path(self.folder, contents.state.step)
        if any(gather_json(target.is_dir())):
            self._settle(step)  # a run that was killed right after the rename has not
            return target
        if not self._asynchronous:
            self._write(contents, step)
            return target
        snapshot = Snapshot()
        write_contents(contents, snapshot)
        self._thread = Thread(target=self._write_snapshot, args=(snapshot, step), name="mtrl checkpoint")
        self._thread.start()
        return target

    def wait(self) -> None:
        """Return when this rank writes nothing; raises what its thread met, which all ranks' threads agreed
        on.
        """
        if self._thread.ident is not None:
            self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_snapshot(self, snapshot: "Snapshot", step: int) -> None:
        try:
            self._write(snapshot, step)
        except Exception as error:  # raised again by `wait`, on the thread that can end the run
            self._failure = error

    def _write(self, source: "Contents | Snapshot", step: int) -> None:
        partial = partial_path(self.folder, step)

        def make_folder() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            sync_folder(self.folder.parent)

        try:
            agree(self._attempt(make_folder), self._group)
            out = FolderWriter(partial)
            source.replay(out) if isinstance(source, Snapshot) else write_contents(source, out)
            agree(out.error, self._group)
            self._publish(out.records, step)
        except CheckpointError as failed:
            self._attempt(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {failed}; those before it are whole. "
                "Make room or mend the disk, then go on from the newest with if_exists=resume"
            ) from failed
        self._settle(step)

    def _settle(self, step: int) -> None:
        """What follows once a checkpoint can be seen. Collective over the writers' group."""
        try:
            agree(self._attempt(lambda: point_latest(self.folder, step)), self._group)
            agree(self._attempt(self._prune), self._group)
        except CheckpointError as failed:
            raise CheckpointError(
                f"the checkpoint of step {step} is whole, but what follows it failed: {failed}. "
                "Mend the disk, then go on from it with if_exists=resume"
            ) from failed

    def _publish(self, records: list[FileRecord], step: int) -> None:
        """Write the manifest and let the checkpoint be seen. Collective over the writers' group."""
        everyones = gather_json([record.to_json() for record in records], self._group)

        def show() -> None:
            files = sorted((FileRecord(**each) for rank in everyones for each in rank), key=lambda f: f.name)
            manifest = Manifest(step=step, files=tuple(files))
            write_file(partial_path(self.folder, step) / MANIFEST, manifest.to_json())
            publish(self.folder, step)

        agree(self._attempt(show), self._group)

    def _prune(self) -> None:
        prune(self.folder, keep_last=self.keep_last, keep_every=self.keep_every)

    def _attempt(self, action: Callable[[], None]) -> OSError | None:
        """Do something on rank 0 alone; what it met."""
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                return error
        return None


@dataclass(slots=True)
class Snapshot:
    """Files kept in memory, on the CPU, to be written later."""

    _files: list[tuple[str, bytes | dict[str, Tensor]]] = field(default_factory=list)

    def write(self, name: str, data: bytes) -> None:
        """A file with this content."""
        self._files.append((name, data))

    @contextmanager
    def tensors(self, name: str, kinds: Mapping[str, TensorKind]) -> Iterator[PutTensor]:
        """A safetensors file; tensors are copied."""
        kept: dict[str, Tensor] = {}

        def put(key: str, tensor: Tensor) -> None:
            kept[key] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())

        yield put
        assert list(kept) == list(kinds), f"{name}: tensors out of turn"
        self._files.append((name, kept))

    def replay(self, out: FileSink) -> None:
        """Give everything to ``out``, freeing it file by file."""
        while self._files:
            name, content = self._files.pop(0)
            if isinstance(content, bytes):
                out.write(name, content)
            else:
                _write_tensors(out, name, content)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from one Hugging Face folder to another."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
