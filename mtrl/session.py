"""A run in progress: what the loops of ``sft.py`` and ``rl.py`` work with.

``open_session`` starts torch.distributed and builds model, trainer and engine; ``Session`` holds them with
the run's folder and counters.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from mtrl.batch import Sample
from mtrl.checkpoint.save import copy_tokenizer, save_checkpoint
from mtrl.config import Config
from mtrl.exchange import sum_over_ranks
from mtrl.metrics import EvaluationMetrics, MetricsWriter, Stopwatch, peak_memory
from mtrl.models.builder import Model, build_model
from mtrl.models.hf import initialize, load_hf
from mtrl.models.megatron_config import recompute_fields
from mtrl.parallel import determinism, groups
from mtrl.parallel.device import current_device
from mtrl.parallel.layout import RankLayout
from mtrl.plots import plot_rewards
from mtrl.policy import Microbatch, make_microbatches
from mtrl.preflight import Job
from mtrl.progress import Progress, open_progress
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all, score_on_all
from mtrl.rollout.vllm_engine import VllmEngine
from mtrl.run_folder import Json, RunFolder, write_atomically
from mtrl.trainer import Trainer
from mtrl.weight_push.push import WeightPush

_ENGINE_DTYPES: dict[str, tuple[Literal["float32", "bfloat16"], torch.dtype]] = {
    "fp32": ("float32", torch.float32),
    "bf16": ("bfloat16", torch.bfloat16),
}


@dataclass(slots=True, kw_only=True)
class Sampling:
    """The engine, its push, and the version of the weights it holds."""

    engine: VllmEngine
    push: WeightPush
    policy_version: int = 0

    def take_over_weights(self) -> int:
        """Push the trainer's weights under the next version; bytes this rank received. Collective."""
        received = self.push.run(policy_version=self.policy_version + 1)
        self.policy_version += 1
        return received


@dataclass(slots=True, kw_only=True)
class Session:
    """All parts of a run on this rank. ``step`` counts finished steps over all phases."""

    job: Job
    folder: RunFolder
    model: Model
    trainer: Trainer
    sampling: Sampling | None
    writer: MetricsWriter
    progress: Progress
    started_at: float
    step: int = 0
    engine_start_s: float | None = None
    summary: dict[str, Json] = field(default_factory=dict)

    def stopwatch(self) -> Stopwatch:
        """A stopwatch that waits for the GPU where there is one."""
        return Stopwatch(torch.cuda.synchronize if current_device().kind == "cuda" else None)

    def microbatches(self, samples: list[Sample]) -> list[Microbatch]:
        """This rank's microbatches of a global batch. Every rank passes the whole batch."""
        max_tokens = self.job.config.algorithm.max_tokens_per_microbatch
        return make_microbatches(
            samples, self.model, max_tokens=max_tokens, pad_token_id=self.job.pad_token_id
        )

    def evaluate(self, phase: Literal["sft", "grpo"], *, summarize_as: str | None = None) -> float | None:
        """Greedy accuracy on the held-out prompts, None if there are none. Collective over WORLD.

        ``summarize_as`` puts it into the summary under that name too.
        """
        prompts, reward = self.job.eval_prompts, self.job.eval_reward
        if self.sampling is None or reward is None or not prompts:
            return None
        start = time.perf_counter()
        greedy = SamplingSettings(
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=self.job.config.eval_max_new_tokens,
            num_samples=1,
            stop_token_ids=self.job.stop_token_ids,
        )
        completions = sample_on_all(self.sampling.engine, prompts, greedy, seed=self.job.config.seed)
        rewards = score_on_all(reward, prompts, completions)
        accuracy = sum(rewards) / len(rewards)
        seconds = time.perf_counter() - start
        self.writer.write_evaluation(
            EvaluationMetrics(
                step=self.step,
                phase=phase,
                accuracy=accuracy,
                num_prompts=len(prompts),
                evaluation_s=seconds,
            )
        )
        if summarize_as is not None:
            self.summary |= {summarize_as: accuracy, "num_eval_prompts": len(prompts)}
        self.progress.message(f"held-out accuracy after step {self.step}: {accuracy:.1%}")
        return accuracy

    def save(self) -> Path:
        """Write a checkpoint of this step. Collective over WORLD."""
        config = self.job.config
        path = save_checkpoint(
            self.model,
            self.folder.checkpoints_path,
            step=self.step,
            tokenizer=config.tokenizer_path,
            keep_last=config.checkpoint.keep_last,
        )
        self.summary["model_path"] = str(path)
        return path

    def is_due(self, every_steps: int, step: int, total_steps: int) -> bool:
        """Whether something done every so many steps of a phase falls on ``step``; never on the last."""
        return every_steps > 0 and step % every_steps == 0 and step < total_steps

    def finish(self) -> None:
        """Save the model, write the summary and the plot. Collective over WORLD."""
        self.save()
        memory = peak_memory()
        self.summary |= {
            "num_steps": self.step,
            "peak_memory_bytes": int(sum_over_ranks(memory.host_bytes)),
            "peak_device_memory_bytes": int(sum_over_ranks(memory.device_bytes)),
            "engine_start_s": self.engine_start_s,
            "seconds_total": time.time() - self.started_at,
        }
        if self.folder.is_writer:
            self.folder.write_summary(self.summary)
            if self.job.rollout is not None:
                plot_rewards(
                    self.folder.metrics_path,
                    self.folder.evaluations_path,
                    self.folder.plot_path,
                    title=f"{self.job.config.algorithm.name} on {self.job.actor}",
                )


@contextmanager
def open_session(job: Job, folder: RunFolder, started_at: float) -> Iterator[Session]:
    """Build every part of a run, and take it down again. Collective over all processes of the job."""
    config = job.config
    if config.deterministic:
        determinism.set_environment()
    groups.init_distributed()
    parallel = groups.create(
        RankLayout.from_spec(job.actor), virtual_pipeline_size=config.actor.virtual_pipeline_size
    )
    groups.seed_everything(config.seed, parallel)
    model = build_model(
        job.model,
        parallel,
        precision=config.model.precision,
        num_chunks=config.actor.virtual_pipeline_size or 1,
        **_megatron_fields(config),
    )
    if config.model.path:
        load_hf(model, Path(config.model.path))
    else:
        initialize(model, config.seed)
    trainer = Trainer(
        model,
        config.actor.optimizer,
        router=config.actor.router,
        temperature=config.rollout.temperature,
        deterministic=config.deterministic,
    )
    start = time.perf_counter()
    sampling = _start_engine(job, folder, model) if job.rollout is not None else None
    progress = open_progress(config.logging.progress, rank=parallel.rank)
    with MetricsWriter(folder, config) as writer:
        session = Session(
            job=job,
            folder=folder,
            model=model,
            trainer=trainer,
            sampling=sampling,
            writer=writer,
            progress=progress,
            started_at=started_at,
            engine_start_s=time.perf_counter() - start if sampling else None,
        )
        try:
            yield session
        finally:
            progress.close()
    if sampling is not None:
        sampling.engine.shutdown()
    groups.destroy()
    dist.destroy_process_group()


def _megatron_fields(config: Config) -> dict[str, Any]:
    actor = config.actor
    fields: dict[str, Any] = recompute_fields(actor.recompute, actor.recompute_modules)
    if actor.sequence_parallel != "auto":
        fields["sequence_parallel"] = actor.sequence_parallel
    if config.deterministic:
        fields["deterministic_mode"] = True
    return fields


def _start_engine(job: Job, folder: RunFolder, model: Model) -> Sampling:
    """Start vLLM on these ranks, from a folder that holds the model's config and tokenizer."""
    assert job.rollout is not None
    config, home = job.config.rollout, folder.path / "engine"
    if folder.is_writer:
        home.mkdir()
        copy_tokenizer(job.config.tokenizer_path, home)
        write_atomically(home / "config.json", _to_json(job))
    dist.barrier()
    name, dtype = _ENGINE_DTYPES[job.config.model.precision if config.dtype == "auto" else config.dtype]
    engine = VllmEngine.create(
        home,
        job.rollout,
        max_model_len=job.max_model_len,
        max_num_seqs=config.max_num_seqs,
        dtype=name,
        seed=job.config.seed,
        kv_cache_bytes=config.kv_cache_bytes,
        expert_parallel=config.expert_parallel,
    )
    return Sampling(engine=engine, push=WeightPush(model, engine, dtype))


def _to_json(job: Job) -> str:
    import json

    return json.dumps(dict(job.model.hf_config), indent=2) + "\n"
