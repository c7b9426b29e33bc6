"""Whether a config fits the checkpoint it is to go on from. Reads small files only; imports no torch."""

from pathlib import Path

from mtrl.checkpoint.folder import step_path, steps
from mtrl.checkpoint.format import (
    MANIFEST,
    REFERENCE,
    RUN_CONFIG,
    STATE,
    Manifest,
    PhaseName,
    RunState,
    problems,
    read_json,
)
from mtrl.parallel.errors import CheckpointError, ConfigError
from mtrl.preflight import Job


def check_before_start(job: Job) -> None:
    """Check what can be without reading weights: does the config fit the newest checkpoint? Not collective.

    Whether that one is whole is found out later, when ranks can share the reading.

    Raises:
        ConfigError, CheckpointError: as `check_fits` does.
    """
    checkpoints = Path(job.config.output_dir) / "checkpoints"
    present = steps(checkpoints) if job.config.if_exists == "resume" else []
    if not present:
        return
    newest = step_path(checkpoints, present[-1])
    try:
        files = [each for each in Manifest.read(newest).files if each.name in (STATE, RUN_CONFIG)]
        if len(files) < 2 or problems(newest, files):
            return
        state = RunState.read(newest)
    except CheckpointError:
        return  # damaged; `resume.find` says so, with what else there is
    check_fits(job, newest, state)


def check_fits(job: Job, checkpoint: Path, state: RunState) -> None:
    """Check what must be as it was.

    Raises:
        ConfigError: what differs, and what to write.
        CheckpointError: it was written without optimizer state.
    """
    config, then = job.config, read_json(checkpoint / RUN_CONFIG)
    reference = checkpoint.parent / REFERENCE
    fixed = {
        "seed": (state.seed, config.seed),
        "model.precision": (state.precision, config.model.precision),
        "algorithm.name": (then["algorithm"]["name"], config.algorithm.name),
    }
    for key, (was, is_now) in fixed.items():
        if was != is_now:
            raise ConfigError(
                f"{key}: given {is_now}, but {checkpoint} was written with {was}; write {key}={was}"
            )
    if state.num_optimizer_tensors == 0:
        raise CheckpointError(
            f"{checkpoint} was written with checkpoint.contents=weights, without what a run needs to go on; "
            f"start a new one from it with model.path={checkpoint}"
        )
    if config.algorithm.kl_coef and state.phase == "main" and not (reference / MANIFEST).is_file():
        raise ConfigError(
            f"algorithm.kl_coef: given {config.algorithm.kl_coef:g}, but {reference} is not there: the run "
            "kept no reference at its first rollout; write algorithm.kl_coef=0, or start a new run from the "
            f"checkpoint with model.path={checkpoint}"
        )
    data, num_records = _data_of(job, state.phase)
    if num_records != state.num_records:
        raise ConfigError(
            f"{data}: has {num_records} records, had {state.num_records} when {checkpoint} was written; the "
            "order of training is one of those. Give the same data, or start a new run from the checkpoint "
            f"with model.path={checkpoint}"
        )


def _data_of(job: Job, phase: PhaseName) -> tuple[str, int]:
    if phase == "warm_start":
        return "data.warm_start", len(job.warm_start_samples)
    return "data.train", len(job.train_samples or job.train_prompts)
