"""Supervised fine-tuning: imitate the trained tokens of the samples, by maximum likelihood."""

from collections.abc import Callable, Sequence

from mtrl.batch import Sample
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
    """Run SFT over shuffled epochs of ``samples``, from the session's position. Collective over WORLD.

    ``is_enough`` is asked after every step, on all ranks, whether to end before ``total_steps``.
    """
    trainer, loss = session.trainer, SftLoss()
    session.progress.start_phase("sft", total_steps)
    for step in range(session.position.step + 1, total_steps + 1):
        watch = session.stopwatch()
        indices, cursor = session.position.cursor.take(samples_per_step)
        with watch("train_s"):
            session.turn_to("training")
            result = trainer.step(session.microbatches([samples[i] for i in indices]), loss)
        session.advance(cursor)
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
        if is_enough(step):
            return
        session.end_step(save=session.is_due(checkpoint_every, step, total_steps))
