"""Start a run: ``torchrun --nproc-per-node N mtrl/train.py CONFIG [key=value ...] [--dry-run]``."""

import sys
import time
from pathlib import Path

STARTED_AT = time.time()
if __name__ == "__main__" and (Path(__file__).parents[1] / "pyproject.toml").is_file():
    # torchrun puts this folder first; from a checkout the package is found one above it.
    sys.path[0] = str(Path(__file__).parents[1])

import argparse  # noqa: E402

from mtrl.config_check import world_size_from_env  # noqa: E402
from mtrl.config_load import load_config  # noqa: E402
from mtrl.last_words import is_first_of_node, leave, tell  # noqa: E402
from mtrl.parallel.errors import MtrlError  # noqa: E402
from mtrl.preflight import Job, prepare  # noqa: E402
from mtrl.resume_check import check_before_start  # noqa: E402
from mtrl.run_folder import open_run_folder  # noqa: E402


def main(arguments: list[str]) -> int:
    """Parse, check, run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mtrl/train.py", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file; see docs/config.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as rollout.n_samples=16")
    parser.add_argument("--dry-run", action="store_true", help="resolve and check everything, then exit")
    options = parser.parse_intermixed_args(arguments)
    try:
        job = prepare(load_config(options.config, options.overrides), world_size_from_env())
        check_before_start(job)
        if options.dry_run:
            _print_checked(job)
            return 0
        folder = open_run_folder(job.config)
    except MtrlError as error:
        return tell(error, has_started=False)
    from mtrl.parallel import quiet

    quiet.install()
    from mtrl.run import run

    try:
        run(job, folder, STARTED_AT)
    except Exception as error:
        leave(error)
    return 0


def _print_checked(job: Job) -> None:
    if is_first_of_node():
        text = job.config.to_yaml()
        print(text + f"# checked: {job.actor} fits {job.model.family}; nothing was started")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
