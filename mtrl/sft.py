"""Supervised fine-tuning: imitate the trained tokens of the samples, by maximum likelihood."""

from collections.abc import Callable, Sequence

from mtrl.batch import Sample
from mtrl.data.order import DataCursor
from mtrl.metrics import StepMetrics
from mtrl.objectives import SftLoss
from mtrl.session import Session


def train_sft(
    session: Session,
    samples: Sequence[Sample],
    *,
    total_steps: int,
    samples_per_step: int,
    checkpoint_every: int = 0,
    is_enough: Callable[[int], bool] = lambda step: False,
) -> None:
    """Run SFT over shuffled epochs of ``samples``. Collective over WORLD.

    ``is_enough`` is asked after every step, on all ranks, whether to end before ``total_steps``.
    """
    trainer, loss = session.trainer, SftLoss()
    cursor = DataCursor(num_records=len(samples), seed=session.job.config.seed)
    session.progress.start_phase("sft", total_steps)
    for step in range(1, total_steps + 1):
        watch = session.stopwatch()
        indices, cursor = cursor.take(samples_per_step)
        with watch("train_s"):
            result = trainer.step(session.microbatches([samples[i] for i in indices]), loss)
        session.step += 1
        metrics = StepMetrics(
            step=session.step,
            phase="sft",
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            num_tokens=result.num_tokens,
            router_aux_loss=result.router.aux_loss if result.router else None,
            router_z_loss=result.router.z_loss if result.router else None,
            seconds=watch.read(),
        )
        session.writer.write_step(metrics)
        session.progress.update(metrics)
        if session.is_due(checkpoint_every, step, total_steps):
            session.save()
        if is_enough(step):
            return
