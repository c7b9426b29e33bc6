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
from mtrl.parallel.errors import MtrlError  # noqa: E402
from mtrl.run_folder import open_run_folder  # noqa: E402


def main(arguments: list[str]) -> None:
    """Parse, check, run."""
    parser = argparse.ArgumentParser(prog="mtrl/train.py", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file; see docs/config.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as rollout.n_samples=16")
    parser.add_argument("--dry-run", action="store_true", help="resolve and check everything, then exit")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    from mtrl.preflight import prepare

    job = prepare(config, world_size_from_env())
    if options.dry_run:
        print(config.to_yaml() + f"# checked: {job.actor} fits {job.model.family}; nothing was started")
        return
    folder = open_run_folder(config)
    from mtrl.run import run

    run(job, folder, STARTED_AT)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MtrlError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
