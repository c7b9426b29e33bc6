"""Start torch.distributed, build model, trainer and engine, and take them down again."""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.checkpoint.format import PhaseName
from mtrl.checkpoint.reference import load_reference
from mtrl.checkpoint.save import Checkpointer, copy_tokenizer
from mtrl.data.order import DataCursor
from mtrl.memory import Memory
from mtrl.metrics import MetricsWriter
from mtrl.model_settings import backend_of, fp8_of, moe_fields, weights_precision
from mtrl.models.builder import Model, build_model
from mtrl.models.hf import initialize, load_hf
from mtrl.models.megatron_config import recompute_fields
from mtrl.parallel import determinism, groups
from mtrl.parallel.agreement import agree
from mtrl.parallel.layout import RankLayout
from mtrl.policy import row_length
from mtrl.preflight import Job
from mtrl.probe import NUM_PROMPTS, NUM_TOKENS, Probe
from mtrl.progress import open_progress
from mtrl.resume import Position, Resumed, find
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.own_process import OwnProcessEngine
from mtrl.rollout.vllm_engine import Dtype, VllmEngine
from mtrl.run_folder import RunFolder, write_atomically
from mtrl.session import Sampling, Session
from mtrl.trainer import Trainer
from mtrl.weight_push.push import WeightPush

_ENGINE_DTYPES: dict[str, tuple[Dtype, torch.dtype]] = {
    "fp32": ("float32", torch.float32),
    "bf16": ("bfloat16", torch.bfloat16),
    "fp8": ("fp8", torch.bfloat16),  # what is not quantised
}


@contextmanager
def open_session(job: Job, folder: RunFolder, started_at: float) -> Iterator[Session]:
    """Build every part of a run, and take it down again. Collective over all processes of the job."""
    config, model = job.config, _build(job)
    resumed = find(job, folder)
    reference = _load(job, model, folder, resumed)
    trainer = Trainer(
        model,
        config.actor.optimizer,
        router=config.actor.router,
        temperature=config.rollout.temperature,
        deterministic=config.deterministic,
    )
    start = time.perf_counter()
    sampling = _start_engine(job, folder, trainer) if job.rollout is not None else None
    if sampling is not None and resumed is not None:
        sampling.policy_version = resumed.state.policy_version - 1  # the first push makes it that
    if sampling is not None and config.rollout.verify == "logits":
        sampling.check, sampling.num_checked = (
            _probe(job, sampling, trainer).run,
            config.rollout.verify_pushes,
        )
    progress = open_progress(config.logging.progress, rank=model.groups.rank)
    if sampling is not None and sampling.push.remark:
        progress.message(sampling.push.remark)
    checkpointer = Checkpointer(
        folder.checkpoints_path,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
    )
    step = resumed.state.step if resumed else 0
    first_step = step + 1 if config.if_exists == "resume" else None
    with MetricsWriter(folder, config, first_step=first_step) as writer, _user_buffers(job, model):
        session = Session(
            job=job,
            folder=folder,
            model=model,
            trainer=trainer,
            sampling=sampling,
            writer=writer,
            progress=progress,
            started_at=started_at,
            checkpointer=checkpointer,
            position=resumed.position if resumed else _beginning(job),
            resumed=resumed,
            reference=reference,
            step=step,
            engine_start_s=time.perf_counter() - start if sampling else None,
            summary=dict(resumed.state.summary) if resumed else {},
        )
        try:
            yield session
        finally:
            progress.close()
    if sampling is not None:
        sampling.memory.close()
        sampling.engine.shutdown()
    groups.destroy()
    dist.destroy_process_group()


def _build(job: Job) -> Model:
    """Start torch.distributed, make the groups of the layout, and in them the model without weights."""
    config = job.config
    if config.deterministic:
        determinism.set_environment()
    groups.init_distributed()
    num_chunks = config.actor.virtual_pipeline_size
    parallel = groups.create(RankLayout.from_spec(job.actor), virtual_pipeline_size=num_chunks)
    groups.seed_everything(config.seed, parallel)
    return build_model(
        job.model,
        parallel,
        precision=weights_precision(config),
        fp8=fp8_of(config),
        backend=backend_of(config),
        num_chunks=num_chunks or 1,
        **_megatron_fields(job),
    )


def _user_buffers(job: Job, model: Model) -> AbstractContextManager[None]:
    """Hold Transformer Engine's where the config asks for them."""
    if not job.config.actor.tp_comm_overlap:
        return nullcontext()
    # Imports Transformer Engine, which few machines have.
    from mtrl.models.backends.transformer_engine.user_buffers import user_buffers

    max_tokens = job.config.algorithm.max_tokens_per_microbatch
    return user_buffers(model.transformer_config, model.groups, row_length=row_length(model, max_tokens))


def _beginning(job: Job) -> Position:
    phase: PhaseName = "warm_start" if job.warm_start_samples else "main"
    num_records = len(job.warm_start_samples or job.train_samples or job.train_prompts)
    return Position(phase=phase, step=0, cursor=DataCursor(num_records=num_records, seed=job.config.seed))


def _load(job: Job, model: Model, folder: RunFolder, resumed: Resumed | None) -> list[Tensor] | None:
    """Fill the model from the checkpoint, the model folder or the seed; the reference's weights if resumed
    in a phase that has one.
    """
    config, reference = job.config, None
    if resumed is None:
        load_hf(model, Path(config.model.path)) if config.model.path else initialize(model, config.seed)
        return None
    if config.algorithm.kl_coef and resumed.state.phase == "main":
        load_reference(model, folder.checkpoints_path)
        reference = [tensor.detach().cpu().clone() for tensor in model.tensors().values()]
    load_hf(model, resumed.checkpoint)
    return reference


def _megatron_fields(job: Job) -> dict[str, Any]:
    config, actor = job.config, job.config.actor
    fields: dict[str, Any] = recompute_fields(actor.recompute, actor.recompute_modules)
    fields |= moe_fields(config, job.actor)
    if actor.sequence_parallel != "auto":
        fields["sequence_parallel"] = actor.sequence_parallel
    if config.deterministic:
        fields["deterministic_mode"] = True
    return fields


def _start_engine(job: Job, folder: RunFolder, trainer: Trainer) -> Sampling:
    """Start vLLM on these ranks, from a folder that holds the model's config and tokenizer."""
    assert job.rollout is not None
    config, home = job.config.rollout, folder.path / "engine"
    error: OSError | None = None
    if folder.is_writer:
        try:
            home.mkdir(exist_ok=True)  # a resumed run has one
            copy_tokenizer(job.config.tokenizer_path, home)
            write_atomically(home / "config.json", _to_json(job))
        except OSError as caught:
            error = caught
    agree(error)
    name, dtype = _ENGINE_DTYPES[weights_precision(job.config) if config.dtype == "auto" else config.dtype]
    settings: dict[str, Any] = dict(
        max_model_len=job.max_model_len,
        max_num_seqs=config.max_num_seqs,
        dtype=name,
        seed=job.config.seed,
        kv_cache_bytes=config.kv_cache_bytes,
        expert_parallel=config.expert_parallel,
        moe_backend=config.moe_backend,
    )
    engine: InPlaceEngine
    if config.process == "own":
        engine = OwnProcessEngine.create(home, job.rollout, **settings)
    else:
        engine = VllmEngine.create(home, job.rollout, sleeps=config.sleep, **settings)
    push = WeightPush(
        trainer.model,
        engine,
        dtype,
        bucket_bytes=config.push_bucket_bytes,
        transport=config.push_transport,
        num_verified=config.verify_pushes if config.verify == "checksum" else 0,
    )
    memory = Memory(trainer.host_copies(), engine if config.sleep else None, job.config.actor.offload)
    return Sampling(engine=engine, push=push, memory=memory)


def _probe(job: Job, sampling: Sampling, trainer: Trainer) -> Probe:
    algorithm, rollout = job.config.algorithm, job.config.rollout
    prompts = (*job.eval_prompts, *job.train_prompts)[:NUM_PROMPTS]
    return Probe(
        engine=sampling.engine,
        trainer=trainer,
        prompts=[replace(each, prompt_id=number) for number, each in enumerate(prompts)],
        num_tokens=min(NUM_TOKENS, rollout.max_new_tokens),
        max_k3_kl=algorithm.max_k3_kl,
        temperature=rollout.temperature,
        max_tokens=algorithm.max_tokens_per_microbatch,
        pad_token_id=job.pad_token_id,
    )


def _to_json(job: Job) -> str:
    return json.dumps(dict(job.model.hf_config), indent=2) + "\n"
