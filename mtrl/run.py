"""The phases of a run, in order."""

import shlex

from mtrl.config import WarmStartSection
from mtrl.opening import open_session
from mtrl.parallel.errors import MismatchError, NonFiniteError
from mtrl.preflight import Job
from mtrl.progress import ComparisonRow, print_comparison
from mtrl.rl import train_rl
from mtrl.run_folder import RunFolder
from mtrl.session import Sampling, Session
from mtrl.sft import train_sft
from mtrl.stop import Stopped


def run(job: Job, folder: RunFolder, started_at: float) -> None:
    """Train as the config says, evaluate, save. Collective over all processes of the job."""
    with open_session(job, folder, started_at) as session:
        try:
            with session.stop.listening():
                if job.config.algorithm.name == "sft":
                    _sft(session)
                else:
                    _grpo(session)
                session.finish()
        except (MismatchError, NonFiniteError):
            session.checkpointer.wait()  # all ranks are here; what is being written is of a step before
            raise
        except Stopped:
            session.progress.message(
                f"stopped after step {session.step}, as asked, with a checkpoint; the same command with "
                "if_exists=resume goes on"
            )
            return
    if folder.is_writer:
        _print_end(session)


def _sft(session: Session) -> None:
    algorithm, optimizer = session.job.config.algorithm, session.job.config.actor.optimizer
    session.start_phase(
        "main",
        num_records=len(session.job.train_samples),
        total_steps=algorithm.total_steps,
        lr=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
    )
    train_sft(
        session,
        session.job.train_samples,
        total_steps=algorithm.total_steps,
        samples_per_step=algorithm.samples_per_step or 1,
        checkpoint_every=session.job.config.checkpoint.every_steps,
    )


def _grpo(session: Session) -> None:
    algorithm, optimizer = session.job.config.algorithm, session.job.config.actor.optimizer
    assert session.sampling is not None
    session.sampling.take_over_weights()
    if session.step == 0:
        session.evaluate("sft" if algorithm.warm_start else "grpo", summarize_as="accuracy_before")
    if algorithm.warm_start and session.position.phase == "warm_start":
        _warm_start(session, session.sampling, algorithm.warm_start)
    session.start_phase(
        "main",
        num_records=len(session.job.train_prompts),
        total_steps=algorithm.total_steps * algorithm.minibatches_per_step,
        lr=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
    )
    train_rl(session)
    if session.has_trained or "accuracy_after_grpo" not in session.summary:
        session.evaluate("grpo", summarize_as="accuracy_after_grpo")


def _warm_start(session: Session, sampling: Sampling, settings: WarmStartSection) -> None:
    def is_enough(step: int) -> bool:
        if settings.until_accuracy is None or step % settings.evaluate_every:
            return False
        sampling.take_over_weights()
        return (session.evaluate("sft") or 0.0) >= settings.until_accuracy

    session.start_phase(
        "warm_start",
        num_records=len(session.job.warm_start_samples),
        total_steps=settings.total_steps,
        lr=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay="constant",
    )
    train_sft(
        session,
        session.job.warm_start_samples,
        total_steps=settings.total_steps,
        samples_per_step=settings.samples_per_step,
        checkpoint_every=session.job.config.checkpoint.every_steps,
        is_enough=is_enough,
    )
    sampling.take_over_weights()
    session.evaluate("sft", summarize_as="accuracy_after_sft")


def _print_end(session: Session) -> None:
    summary = session.summary
    before = summary.get("accuracy_after_sft", summary.get("accuracy_before"))
    after = summary.get("accuracy_after_grpo")
    if isinstance(before, float) and isinstance(after, float):
        row = ComparisonRow(name="held-out accuracy (greedy)", before=f"{before:.1%}", after=f"{after:.1%}")
        print_comparison("What GRPO did", [row])
        print(f"plot:   {session.folder.plot_path}")
    print(f"model:  {summary['model_path']}")
    prompts = session.job.eval_prompts or session.job.train_prompts
    prompt = f" --prompt {shlex.quote(prompts[0].text)}" if prompts and "\n" not in prompts[0].text else ""
    print("\nTry next:")
    print(f"  python tools/generate.py --model {summary['model_path']}{prompt}")
    print("  docs/own_model.md: the same from a Hugging Face folder of your own (model.path=FOLDER)")
