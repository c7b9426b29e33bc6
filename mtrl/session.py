"""A run in progress: what the loops of ``sft.py`` and ``rl.py`` work with. ``opening.py`` builds it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mtrl.batch import Sample
from mtrl.checkpoint.folder import step_path
from mtrl.checkpoint.format import PhaseName, RunState
from mtrl.checkpoint.fp8_scales import restore_scales
from mtrl.checkpoint.load import restore_generators, restore_optimizer
from mtrl.checkpoint.optimizer_state import OptimizerState
from mtrl.checkpoint.reference import save_reference
from mtrl.checkpoint.save import Checkpointer, Contents
from mtrl.config_engines import Decay
from mtrl.data.order import DataCursor
from mtrl.exchange import sum_over_ranks
from mtrl.logprobs import logprob_kernel
from mtrl.memory import Memory, Stage
from mtrl.metrics import EvaluationMetrics, MetricsWriter, Stopwatch, peak_memory
from mtrl.model_settings import backend_of, weights_precision
from mtrl.models.backends.torch_native.rotation import rotation_kernel
from mtrl.models.builder import Model
from mtrl.parallel.device import current_device
from mtrl.plots import plot_rewards
from mtrl.policy import Microbatch, make_microbatches
from mtrl.preflight import Job
from mtrl.progress import Progress
from mtrl.resume import Position, Resumed
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all, score_on_all
from mtrl.run_folder import Json, RunFolder
from mtrl.stop import Stopped, StopRequest
from mtrl.trainer import Trainer
from mtrl.weight_push.push import WeightPush


@dataclass(slots=True, kw_only=True)
class Sampling:
    """The engine, its push, and the version of the weights it holds.

    ``check`` is run after each of the next ``num_checked`` pushes. ``memory`` makes room for each of them.
    """

    engine: InPlaceEngine
    push: WeightPush
    memory: Memory
    policy_version: int = 0
    check: Callable[[], None] | None = None
    num_checked: int = 0
    _repeated_bytes: int = 0

    def take_over_weights(self) -> int:
        """Push the trainer's weights under the next version. Collective.

        Returns the bytes this rank received, with those of weights that were pushed again before.
        """
        received = self._push(self.policy_version + 1) + self._repeated_bytes
        self._repeated_bytes = 0
        self.policy_version += 1
        if self.check is not None and self.num_checked > 0:
            self.num_checked -= 1
            self.memory.to("check")
            self.check()
        return received

    def turn_to(self, stage: Stage) -> None:
        """Give this device's memory to who works next. An engine that slept since the last push, as for a
        checkpoint, is given the same weights again. Collective.
        """
        if stage == "sampling" and self.memory.is_engine_empty:
            self._repeated_bytes += self._push(self.policy_version)
        self.memory.to(stage)

    def _push(self, policy_version: int) -> int:
        self.memory.to("push")
        received = self.push.run(policy_version=policy_version)
        self.memory.filled()
        return received


@dataclass(slots=True, kw_only=True)
class Session:
    """All parts of a run on this rank. ``step`` counts finished steps over all phases, ``position`` those of
    the phase in progress. ``resumed`` is the checkpoint the run goes on from.
    """

    job: Job
    folder: RunFolder
    model: Model
    trainer: Trainer
    sampling: Sampling | None
    writer: MetricsWriter
    progress: Progress
    started_at: float
    checkpointer: Checkpointer
    position: Position
    resumed: Resumed | None
    reference: list[Tensor] | None = None
    step: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    engine_start_s: float | None = None
    summary: dict[str, Json] = field(default_factory=dict)

    def turn_to(self, stage: Stage) -> None:
        """Give this device's memory to who works next; see ``memory.py``."""
        if self.sampling is not None:
            self.sampling.turn_to(stage)

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
        self.turn_to("sampling")
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

    @property
    def has_trained(self) -> bool:
        """Whether this process made a step, in distinction to one that it resumed after."""
        return self.step > (self.resumed.state.step if self.resumed else 0)

    def start_phase(
        self,
        phase: PhaseName,
        *,
        num_records: int,
        total_steps: int,
        lr: float,
        warmup_steps: int,
        decay: Decay | None = None,
    ) -> None:
        """Begin a phase on ``num_records`` of data, or go on in it where the checkpoint stood.

        Collective over WORLD; the settings are `Trainer.start_phase`'s.
        """
        self.turn_to("training")
        self.trainer.start_phase(total_steps=total_steps, lr=lr, warmup_steps=warmup_steps, decay=decay)
        if self.resumed is not None and not self.has_trained and self.resumed.state.phase == phase:
            self._go_on(self.resumed)
        else:
            cursor = DataCursor(num_records=num_records, seed=self.job.config.seed)
            self.position = Position(phase=phase, step=0, cursor=cursor)
            if phase == "main" and self.job.config.algorithm.kl_coef:
                save_reference(self.model, self.folder.checkpoints_path)
                self.reference = self.trainer.copy_weights()

    def _go_on(self, resumed: Resumed) -> None:
        state = resumed.state
        num_tensors = restore_optimizer(self.model, self.trainer.optimizer, resumed.checkpoint, state)
        self.trainer.go_on_at(state.scheduler_steps)
        same_layout = restore_generators(self.model, resumed.checkpoint, state)
        for message in resumed.messages:
            self.progress.message(message)
        self.progress.message(
            f"resumed from {resumed.checkpoint}: weights; optimizer: {num_tensors} of "
            f"{state.num_optimizer_tensors} tensors, step {state.optimizer_steps}; record {state.index} "
            f"of epoch {state.epoch}; random generators: {'restored' if same_layout else 'seeded anew'}"
        )
        if self.job.config.model.precision == "fp8_delayed":
            restored = restore_scales(self.model, resumed.checkpoint, state)
            self.progress.message(
                "scales of fp8_delayed: "
                + (
                    "restored"
                    if restored
                    else "none of this layout in the checkpoint; their history begins anew"
                )
            )

    def reference_weights(self) -> list[Tensor]:
        """The weights at the first rollout, for the KL penalty."""
        assert self.reference is not None, "start_phase keeps them, or open_session reads them"
        return self.reference

    def advance(self, cursor: DataCursor) -> None:
        """Count a step whose data end at ``cursor``."""
        self.step += 1
        self.position = replace(self.position, step=self.position.step + 1, cursor=cursor)

    def end_step(self, *, save: bool) -> None:
        """After everything else of a step: save if it is time, or if the run is asked to stop.

        Collective over WORLD.

        Raises:
            Stopped: it was, and has a checkpoint of this step.
        """
        is_last = self.stop.is_agreed()
        if save or is_last:
            self.save()
        if is_last:
            self.checkpointer.wait()
            raise Stopped

    def save(self) -> Path:
        """Write a checkpoint of this step. Collective over WORLD."""
        self.turn_to("training")
        config = self.job.config
        path = step_path(self.folder.checkpoints_path, self.step)
        self.summary["model_path"] = str(path)
        has_all = config.checkpoint.contents == "all"
        contents = Contents(
            model=self.model,
            optimizer=self.trainer.optimizer if has_all else None,
            state=self._state(),
            config=asdict(config),
            tokenizer=config.tokenizer_path,
        )
        return self.checkpointer.save(contents)

    def _state(self) -> RunState:
        config, position = self.job.config, self.position
        has_all = config.checkpoint.contents == "all"
        optimizer = OptimizerState.of(self.model, self.trainer.optimizer)
        cursor = position.cursor
        return RunState(
            step=self.step,
            phase=position.phase,
            phase_step=position.step,
            num_records=cursor.num_records,
            seed=cursor.seed,
            epoch=cursor.epoch,
            index=cursor.index,
            optimizer_steps=optimizer.num_steps,
            scheduler_steps=self.trainer.scheduler.num_steps,
            num_optimizer_tensors=optimizer.count_tensors() if has_all else 0,
            policy_version=self.sampling.policy_version if self.sampling else 0,
            spec=str(self.job.actor),
            world_size=self.job.actor.world_size,
            precision=config.model.precision,
            metrics_bytes=self.folder.sync(self.folder.metrics_path),
            evaluations_bytes=self.folder.sync(self.folder.evaluations_path),
            summary=dict(self.summary),
            versions={name: version(name) for name in ("torch", "megatron-core", "transformers")},
        )

    def _uses(self) -> dict[str, Json]:
        """What the run computes with."""
        config, whole = self.job.config, self.trainer.optimizer
        parts = getattr(whole, "chained_optimizers", [whole])
        adams = {type(each.optimizer) for each in parts if not getattr(each, "is_stub_optimizer", False)}
        device = current_device()
        is_gpu = device.kind == "cuda"
        used: dict[str, Json] = {
            "layers": backend_of(config),
            "precision": config.model.precision,
            "dispatcher": config.actor.moe.dispatcher,
            "logprobs": logprob_kernel(),
            "rotation": rotation_kernel(),
            "optimizer": ", ".join(sorted(f"{adam.__module__}.{adam.__name__}" for adam in adams)),
            "device": torch.cuda.get_device_name(device.torch_device) if is_gpu else "cpu",
        }
        if self.sampling is None:
            return used
        dtype = config.rollout.dtype
        sampler = weights_precision(config) if dtype == "auto" else dtype
        push = self.sampling.push.transport.name if self.sampling else ""
        return {**used, "sampler": sampler, "sampler_process": config.rollout.process, "push_transport": push}

    def is_due(self, every_steps: int, step: int, total_steps: int) -> bool:
        """Whether something done every so many steps of a phase falls on ``step``; never on the last."""
        return every_steps > 0 and step % every_steps == 0 and step < total_steps

    def finish(self) -> None:
        """Save, write the summary and the plot. Collective over WORLD."""
        self.save()
        self.checkpointer.wait()
        memory = peak_memory()
        beside = self.sampling.engine.host_bytes_elsewhere() if self.sampling else 0
        self.summary |= {
            "num_steps": self.step,
            "peak_memory_bytes": int(sum_over_ranks(memory.host_bytes + beside)),
            "peak_device_memory_bytes": int(sum_over_ranks(memory.device_bytes)),
            "push_extra_bytes": int(
                sum_over_ranks(float(self.sampling.push.extra_bytes if self.sampling else 0))
            ),
            "uses": self._uses(),
            "engine_start_s": self.engine_start_s,
            "memory_moves": self.sampling.memory.report() if self.sampling else [],
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
