"""Training that is saved, stopped and resumed, on the ranks of a world: what the checkpoint tests run."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from tests.distributed.toy_runs import batch, microbatches


def open_run(model: Any, *, distributed: bool, **settings: Any) -> Any:
    """A trainer with a schedule on the way."""
    from mtrl.config_engines import OptimizerSection
    from mtrl.trainer import Trainer

    section = OptimizerSection(lr=1e-2, grad_clip=0.5, distributed=distributed, weight_decay=0.1, **settings)
    trainer = Trainer(model, section)
    trainer.start_phase(total_steps=8, lr=1e-2, warmup_steps=2, decay="cosine")
    return trainer


def load(groups: Any, num_chunks: int, path: Path, precision: str) -> Any:
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf

    model = build_model(load_model_config(path), groups, num_chunks=num_chunks, precision=precision)
    load_hf(model, path)
    return model


def step(trainer: Any, number: int) -> tuple[float, float]:
    from mtrl.objectives import SftLoss

    result = trainer.step(microbatches(trainer.model, batch(number % 3)), SftLoss())
    return result.loss, result.grad_norm


def contents(trainer: Any, path: Path, number: int) -> Any:
    """What a checkpoint after ``number`` steps is made of."""
    from mtrl.checkpoint.format import RunState
    from mtrl.checkpoint.optimizer_state import OptimizerState
    from mtrl.checkpoint.save import Contents

    own = OptimizerState.of(trainer.model, trainer.optimizer)
    layout = trainer.model.groups.layout
    state = RunState(
        step=number, phase="main", phase_step=number, num_records=10, seed=1, epoch=0, index=number,
        optimizer_steps=own.num_steps, scheduler_steps=trainer.scheduler.num_steps,
        num_optimizer_tensors=own.count_tensors(), policy_version=number, spec=str(layout.spec),
        world_size=layout.world_size, precision="fp32", metrics_bytes=0, evaluations_bytes=0, summary={},
        versions={},
    )  # fmt: skip
    return Contents(model=trainer.model, optimizer=trainer.optimizer, state=state, config={}, tokenizer=path)


def save(trainer: Any, folder: Path, path: Path, number: int, **options: Any) -> Path:
    from mtrl.checkpoint.save import Checkpointer

    checkpointer = Checkpointer(folder, keep_last=None, keep_every=None, **options)
    saved: Path = checkpointer.save(contents(trainer, path, number))
    checkpointer.wait()
    return saved


def resume(groups: Any, num_chunks: int, folder: Path, *, distributed: bool, precision: str) -> Any:
    """A trainer as the newest checkpoint left it."""
    model = load(groups, num_chunks, newest(folder), precision)
    trainer = open_run(model, distributed=distributed)
    restore(trainer, folder)
    return trainer


def newest(folder: Path) -> Path:
    from mtrl.checkpoint.load import newest_whole

    checkpoint, damaged = newest_whole(folder, may_go_back=False)
    assert checkpoint is not None and not damaged
    return checkpoint


def restore(trainer: Any, folder: Path) -> None:
    """Make weights, optimizer and generators those of the newest checkpoint."""
    from mtrl.checkpoint.format import RunState
    from mtrl.checkpoint.load import restore_generators, restore_optimizer
    from mtrl.models.hf import load_hf

    checkpoint = newest(folder)
    state = RunState.read(checkpoint)
    load_hf(trainer.model, checkpoint)
    num_tensors = restore_optimizer(trainer.model, trainer.optimizer, checkpoint, state)
    assert num_tensors == state.num_optimizer_tensors
    trainer.go_on_at(state.scheduler_steps)
    restore_generators(trainer.model, checkpoint, state)


def own_tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """A rank's weights, masters and moments: what training changes."""
    from mtrl.checkpoint.optimizer_state import OptimizerState

    found = {str(key): tensor.detach() for key, tensor in trainer.model.tensors().items()}
    for number, shard in enumerate(OptimizerState.of(trainer.model, trainer.optimizer).shards):
        found |= {f"{kind} of shard {number}": tensor for kind, tensor in shard.tensors().items()}
    return found


def digest(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every weight, master and moment of a checkpoint, put together from its boxes."""
    from mtrl.checkpoint.load import _open_boxes
    from mtrl.models.boxes import Box
    from mtrl.models.sources import SafetensorsSource

    found = {}
    with SafetensorsSource(checkpoint) as source:
        shapes = source.shapes()
        for name, shape in shapes.items():
            found[name] = _sha256(source.read(name, Box.full(shape)))
    with _open_boxes(checkpoint) as (boxes, _):
        for kind, name in boxes.contents():
            found[f"{kind} {name}"] = _sha256(boxes.read(kind, name, Box.full(shapes[name])))
    return found


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
