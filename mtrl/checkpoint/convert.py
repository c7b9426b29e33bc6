"""Conversion between Hugging Face folders, mtrl checkpoints and Megatron's ``torch_dist``, as a stream.

A conversion is planned (`convert_plan`), written into a neighbour of the target, proved (`prove`), and only
then given its name. A few parts of tensors are in memory at a time (`PART_BYTES` each; a stored chunk too
where Megatron's format is read or written), whatever the model's size. Files that were written whole stay if
it is interrupted, and are not written again. A folder's tensors keep the names they have; Megatron's get the
family's published ones.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import torch

from mtrl.checkpoint.convert_plan import JOURNAL, Plan, num_bytes, open_source
from mtrl.checkpoint.format import MANIFEST, STATE, Manifest, RunState, json_bytes, problems
from mtrl.checkpoint.megatron_write import write_torch_dist
from mtrl.checkpoint.torch_dist import RELEASE, TRACKER
from mtrl.models.boxes import Box
from mtrl.models.durable import DurableFile, FileRecord, hash_file, replace_file, sync_folder, write_file
from mtrl.models.files import SafetensorsWriter, TensorKind
from mtrl.models.hf_folder import INDEX_NAME
from mtrl.models.safetensors_header import read_headers
from mtrl.models.sources import TORCH_DTYPES, TensorSource, read_rows
from mtrl.parallel.errors import CheckpointError, ModelError

PART_BYTES = 16 * 2**20
"""glibc gives memory above 32 MiB back at once, and to get it anew costs more than to copy it."""

COPY_BYTES = 8 * 2**20
NUM_WRITERS = 2

Report = Callable[[int], None]


@contextmanager
def hold(plan: Plan) -> Iterator[None]:
    """While inside, no other process writes the same target.

    Raises:
        CheckpointError: another one does.
    """
    plan.request.partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(plan.request.partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another conversion is writing {plan.request.partial}") from error
        yield
    finally:
        os.close(descriptor)


def convert(plan: Plan, report: Report) -> None:
    """Write the plan's folder beside the target; `finish` gives it its name.

    ``report`` is told bytes as they are written, or found written by a conversion that was interrupted.

    Raises:
        CheckpointError: the source is an mtrl checkpoint and damaged.
        OSError: as the system says; what was written stays, for the next try.
    """
    if plan.source_format == "mtrl":
        _check_source(plan)
    done = _begin(plan)
    with open_source(plan.request.source, plan.source_format, plan.config) as source:
        if plan.request.to == "torch_dist":
            if (plan.request.partial / TRACKER).exists():
                report(plan.num_bytes)
                return
            write_torch_dist(
                plan.request.partial,
                plan.config,
                source,
                dtype=plan.request.dtype,
                leave_out=plan.left_out,
                resume=True,  # `_begin` left nothing of another plan
                report=report,
            )
            return
        _write_shards(plan, source, done, report)
    for name, path in plan.copies.items():
        if name not in done:
            (plan.request.partial / name).parent.mkdir(exist_ok=True)
            _finished(plan, replace(_copy(path, plan.request.partial / name), name=name))
    texts = {"config.json": json_bytes(plan.hf_config)}
    if len(plan.shards) > 1:
        weight_map = {name: file for file, tensors in plan.shards.items() for name in tensors}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        texts[INDEX_NAME] = json_bytes(index)
    for name, text in texts.items():
        if name not in done:
            _finished(plan, write_file(plan.request.partial / name, text))


def _check_source(plan: Plan) -> None:
    source = plan.request.source
    wrong = problems(source, Manifest.read(source).files)
    if wrong:
        raise CheckpointError(f"{source} is damaged: {'; '.join(wrong[:10])}; convert another checkpoint")


def _begin(plan: Plan) -> dict[str, FileRecord]:
    """The files of an interrupted conversion of the same plan that are whole; anything else is deleted.

    What is left of a ``torch_dist`` checkpoint stays if it is of the same plan: its writer knows what is
    whole.
    """
    partial, found = plan.request.partial, dict[str, FileRecord]()
    identity, records = _journal(partial)
    if identity == plan.identity():
        named, tracked = (partial / RELEASE).exists(), (partial / TRACKER).exists()
        if plan.request.to == "torch_dist" and named == tracked:
            return {}
        mine = {*plan.shards, *plan.copies}
        found = {record.name: record for record in records if record.name in mine and _is_whole(plan, record)}
    kept = {partial / name for name in (JOURNAL, *found)}  # without its journal it would be nobody's
    for path in sorted(partial.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()
    lines = [plan.identity(), *(json.dumps(record.to_json()) for record in found.values())]
    replace_file(partial / JOURNAL, "".join(f"{line}\n" for line in lines).encode())
    return found


def _is_whole(plan: Plan, record: FileRecord) -> bool:
    path = plan.request.partial / record.name
    if path.is_symlink() or not path.is_file():
        return False
    if not record.sha256:  # `_is_as_planned` looks closer, when the source is open
        return path.stat().st_size == record.num_bytes
    return replace(hash_file(path), name=record.name) == record


def _journal(partial: Path) -> tuple[str, list[FileRecord]]:
    """Whose the folder is, and the files that were finished; the last line may have been cut short."""
    if not (partial / JOURNAL).is_file():
        return "", []
    identity, *lines = (partial / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    records = []
    for line in lines:
        try:
            records.append(FileRecord(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return identity, records


def _finished(plan: Plan, record: FileRecord) -> None:
    with (plan.request.partial / JOURNAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.to_json()) + "\n")


def forget(plan: Plan) -> None:
    """Let nothing of what was written be gone on with: it was proved wrong."""
    replace_file(plan.request.partial / JOURNAL, b"proved wrong\n")


def _write_shards(plan: Plan, source: TensorSource, done: Mapping[str, FileRecord], report: Report) -> None:
    """Write the shards that are not done, `NUM_WRITERS` at a time: hashing and writing take turns well."""
    stop, futures = Event(), list[Future[FileRecord]]()
    errors = list[Exception]()
    # Stored chunks of Megatron's are kept for the next tensor: one reader, in order.
    with ThreadPoolExecutor(1 if plan.source_format == "torch_dist" else NUM_WRITERS) as pool:
        try:
            for file, tensors in plan.shards.items():
                if file in done and _is_as_planned(plan.request.partial / file, tensors, source, done[file]):
                    report(sum(num_bytes(kind) for kind in tensors.values()))
                    continue
                path, hashed = plan.request.partial / file, plan.request.to == "mtrl"
                futures.append(pool.submit(_write_shard, path, tensors, source, report, stop, hashed=hashed))
            for future in as_completed(futures):
                try:
                    _finished(plan, future.result())
                except CancelledError:
                    continue
                except Exception as error:
                    errors.append(error)
                    _stop(futures, stop)
        finally:  # an interrupt, too, must not wait for files of many gigabytes
            _stop(futures, stop)
    if errors:
        raise errors[0]


def _is_as_planned(
    path: Path, tensors: Mapping[str, TensorKind], source: TensorSource, record: FileRecord
) -> bool:
    """Whether a finished file still is what it would be written as; deleted if not.

    One with a checksum has been checked; of others every bit is compared with the source's.
    """
    if record.sha256:
        return True
    try:
        headers = read_headers(path)
        is_same = {name: (TORCH_DTYPES[h.dtype], h.shape) for name, h in headers.items()} == dict(tensors)
    except (ModelError, KeyError):
        is_same = False
    for name, (dtype, shape) in tensors.items() if is_same else ():
        for box in part_boxes(shape):
            wanted = source.read(name, box).to(dtype).contiguous().flatten().view(torch.uint8)
            written = read_rows(path, headers[name], dtype, box).flatten().view(torch.uint8)
            is_same = is_same and bool(torch.equal(wanted, written))
    if not is_same:
        path.unlink()
    return is_same


def _stop(futures: Sequence[Future[FileRecord]], stop: Event) -> None:
    stop.set()
    for future in futures:
        future.cancel()


def _write_shard(
    path: Path,
    tensors: Mapping[str, TensorKind],
    source: TensorSource,
    report: Report,
    stop: Event,
    *,
    hashed: bool,
) -> FileRecord:
    """One file; a checksum is computed only where a manifest will name it."""
    with SafetensorsWriter(path, tensors, hashed=hashed) as writer:
        for name, (dtype, shape) in tensors.items():
            writer.write_parts(name, _parts_to_write(source, name, dtype, shape, report, stop))
        return writer.close()


def _parts_to_write(
    source: TensorSource,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    report: Report,
    stop: Event,
) -> Iterator[torch.Tensor]:
    for part in read_parts(source, name, shape):
        if stop.is_set():
            raise CancelledError
        yield part.to(dtype)
        report(part.numel() * dtype.itemsize)


def read_parts(source: TensorSource, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """A tensor in parts of at most `PART_BYTES` of float32, or one row, in the order of its memory."""
    for box in part_boxes(shape):
        yield source.read(name, box)


def part_boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes of `read_parts`."""
    box = Box.full(shape)
    if not shape:
        yield box
        return
    row_bytes = max(1, 4 * torch.Size(shape[1:]).numel())
    count = max(1, PART_BYTES // row_bytes)
    for start in range(0, shape[0], count):
        yield Box(((start, min(start + count, shape[0])), *box.ranges[1:]))


def _copy(source: Path, target: Path) -> FileRecord:
    """Copy a file, a piece at a time."""
    with source.open("rb") as stream, DurableFile(target) as file:
        while data := stream.read(COPY_BYTES):
            file.write(data)
        return file.close()


def finish(plan: Plan) -> None:
    """Give what was written, and proved, its name; an mtrl checkpoint gets its manifest first."""
    partial, target = plan.request.partial, plan.request.target
    if plan.request.to == "mtrl":
        records = {record.name: record for record in _journal(partial)[1]}
        step = RunState.read(partial).step if STATE in records else 0
        manifest = Manifest(step=step, files=tuple(records[name] for name in sorted(records)))
        write_file(partial / MANIFEST, manifest.to_json())
    for folder in {(partial / name).parent for name in plan.copies}:
        sync_folder(folder)
    (partial / JOURNAL).unlink()
    sync_folder(partial)
    if target.is_dir():
        target.rmdir()
    partial.rename(target)
    sync_folder(target.parent)
