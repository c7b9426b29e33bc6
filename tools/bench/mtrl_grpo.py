"""One process of mtrl's side of ``grpo_step``: the product's own GRPO loop, timed from outside.

Started by torchrun from ``grpo_step``. Writes ``OUT.RANK.json``: wall and CPU seconds of every step, a step
being the time from one call of the progress view to the next, and the stopwatch's readings.
"""

import argparse
import json
import os
import time
import zlib
from dataclasses import asdict, fields
from pathlib import Path

from mtrl.batch import Completion, Prompt
from mtrl.config_check import world_size_from_env
from mtrl.config_load import load_config
from mtrl.metrics import StepMetrics
from mtrl.opening import open_session
from mtrl.preflight import Job, prepare
from mtrl.rl import train_rl
from mtrl.run_folder import open_run_folder


def by_hash(prompt: Prompt, completion: Completion, /) -> float:
    """A reward that costs nothing and favours no length: a hash of the tokens. ``trl_grpo`` has the same."""
    return zlib.crc32(str(list(completion.tokens)).encode()) / 2**32


class EndlessJob(Job):
    """A job none of whose completions stops before its last token."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """None."""
        return ()


class StepClock:
    """A progress view that notes the time."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.k3_kl: list[float | None] = []
        self.lengths: list[float | None] = []

    def start_phase(self, name: str, num_steps: int) -> None:
        """See `Progress`."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def update(self, metrics: StepMetrics) -> None:
        """See `Progress`."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.wall_s.append(wall - self._wall)
        self.cpu_s.append(cpu - self._cpu)
        self.parts.append(asdict(metrics.seconds))
        self.k3_kl.append(metrics.k3_kl)
        self.lengths.append(metrics.completion_length_mean)
        self._wall, self._cpu = wall, cpu

    def message(self, text: str) -> None:
        """See `Progress`."""

    def close(self) -> None:
        """See `Progress`."""


def main() -> None:
    """Run the config's GRPO steps and write what they took."""
    started_at = time.time()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    checked = prepare(config, world_size_from_env())
    job = EndlessJob(**{each.name: getattr(checked, each.name) for each in fields(checked)})
    clock = StepClock()
    with open_session(job, open_run_folder(config), started_at) as session:
        assert session.sampling is not None
        session.progress = clock
        session.sampling.take_over_weights()
        optimizer = config.actor.optimizer
        session.start_phase(
            "main",
            num_records=len(job.train_prompts),
            total_steps=config.algorithm.total_steps,
            lr=optimizer.lr,
            warmup_steps=optimizer.warmup_steps,
        )
        train_rl(session)
    record = {
        "wall_s": clock.wall_s, "cpu_s": clock.cpu_s, "parts": clock.parts,
        "k3_kl": clock.k3_kl, "lengths": clock.lengths,
    }  # fmt: skip
    Path(f"{given.out}.{os.environ['RANK']}.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
