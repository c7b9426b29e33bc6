"""The real vLLM inside the trainer's process: one replica's share on each rank.

Under ``vllm:dNtM`` ranks ``i*M .. i*M+M-1`` are replica ``i``. Runs on CPU over gloo; written for CUDA too,
where it has not been run. Left out: engine pipeline parallelism, CUDA graphs, adapters.
"""

import gc
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import RolloutError
from mtrl.parallel.spec import RolloutSpec
from mtrl.rollout import vllm_build, vllm_layouts, vllm_mends, vllm_process, vllm_short_paths
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.kernel_layout import KernelLayout, PackBlocks
from mtrl.rollout.loader_record import LoaderRecord
from mtrl.rollout.places import Places
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.seeds import completion_seed
from mtrl.rollout.vllm_samples import check_request, completion_of, requests, sampling_params
from mtrl.rollout.weight_loading import WeightLoader

Dtype = Literal["float32", "bfloat16", "fp8"]
"""``fp8``: what fp8_weights.py names in FP8 blocks, all else in bfloat16; GPUs only."""


class VllmEngine(InPlaceEngine):
    """A `RolloutEngine`; build it with `create`, one at a time in a process."""

    def __init__(self, *, llm: Any, spec: RolloutSpec, max_model_len: int, decode: Any, dtype: Dtype) -> None:
        from vllm.distributed.parallel_state import get_tp_group

        self._llm = llm
        self._max_model_len = max_model_len
        self._decode = decode
        self._group: dist.ProcessGroup = get_tp_group().cpu_group
        self._num_requests = 0
        self._worker = llm.model_executor.driver_worker.worker
        self._model = self._worker.model_runner.get_model()
        vllm_short_paths.install(self._model)
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._derived = vllm_mends.derived_weights(self._model)
        self._worker.weight_transfer_engine.derive = self._derive
        if dtype == "fp8":
            vllm_layouts.check_fp8_kernels(self._model)
        vllm_layouts.note_expert_layouts(self._model)
        self._loader = WeightLoader(self._model, getattr(torch, vllm_build.compute_dtype(dtype)), self._group)
        super().__init__(spec=spec, places=self._loader.places, has_fp8_weights=dtype == "fp8")

    @classmethod
    def create(
        cls,
        model_dir: Path,
        spec: RolloutSpec,
        *,
        max_model_len: int,
        max_num_seqs: int,
        dtype: Dtype,
        seed: int,
        kv_cache_bytes: int,
        expert_parallel: bool = False,
        sleeps: bool = False,
        moe_backend: vllm_build.MoeBackend = "triton",
    ) -> "VllmEngine":
        """Build this rank's share of the engine, with random weights. Collective over WORLD, which exists.

        ``model_dir`` holds ``config.json`` and, if completions are to have text, a tokenizer; weights in it
        are not read. ``max_model_len`` counts prompt and completion, in tokens; ``max_num_seqs`` are sampled
        together; ``kv_cache_bytes`` is allocated on each rank at once. ``expert_parallel`` spreads whole
        experts over the replica's ranks, else each expert is sliced. ``sleeps`` lets `sleep` give memory
        back, on a GPU; ``moe_backend`` are experts' kernels there. LayoutError if the spec does not fit the
        world, ModelError without a usable config, RolloutError if vLLM refuses.
        """
        vllm_build.check_spec(model_dir, spec)
        if is_fp8 := dtype == "fp8":
            vllm_build.check_fp8(model_dir, spec, expert_parallel=expert_parallel)
        arguments: dict[str, Any] = dict(
            model=str(model_dir), runner="generate", skip_tokenizer_init=True, load_format="dummy",
            dtype=vllm_build.compute_dtype(dtype), seed=seed % 2**32, tensor_parallel_size=spec.tp,
            distributed_executor_backend="external_launcher", enable_expert_parallel=expert_parallel,
            max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=kv_cache_bytes, enforce_eager=True, async_scheduling=False,
            logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True,
            trust_remote_code=False, enable_prefix_caching=True, enable_sleep_mode=sleeps,
            hf_overrides=vllm_build.overrides(model_dir, fp8=is_fp8),
        )  # fmt: skip
        arguments |= vllm_build.device_arguments(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, fp8=is_fp8, moe_backend=moe_backend
        )
        with vllm_process.as_guest(), vllm_build.without_garbage_collection():
            vllm_process.prepare_environment()
            vllm_process.quiet_log()
            vllm_mends.install()
            vllm_mends.share_job_token()
            arguments["weight_transfer_config"] = vllm_build.transfer_config()
            llm = vllm_build.build(arguments)
            decode = vllm_build.load_decoder(model_dir)
            return cls(llm=llm, spec=spec, max_model_len=max_model_len, decode=decode, dtype=dtype)

    def sleep(self) -> None:
        """See `InPlaceEngine.sleep`.

        Collective over the engine's ranks. Not run yet: vLLM has it on GPUs alone.
        """
        self.void()
        self._llm.sleep(level=2)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """See `InPlaceEngine.wake`."""
        self._llm.wake_up(tags=[part])

    @property
    def loader_record(self) -> LoaderRecord | None:
        """See `InPlaceEngine.loader_record`."""
        return self._loader.record

    def live_parameters(self) -> list[tuple[Mapping[str, Tensor], str]]:
        """Where the model keeps its parameters: each a mapping and its key there."""
        return [
            (module._parameters, name)
            for module in self._model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not f".{name}".endswith(vllm_mends.DERIVED_PARAMETERS)
        ]

    def block_packer(self) -> PackBlocks | None:
        """See `InPlaceEngine.block_packer`."""
        for layer in self._model.modules():
            layout = getattr(getattr(layer, "w13_weight", None), "kernel_layout", None)
            if layout == KernelLayout(rows=16, columns=1):
                method: Any = layer.quant_method
                return partial(_pack_blocks, method.moe_kernel.fused_experts.isa)
        return None

    def plan_weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> LoaderRecord:
        """See `InPlaceEngine.plan_weights`."""
        return self._loader.prepare(shapes, dtypes)

    @property
    def is_shut_down(self) -> bool:
        """See `InPlaceEngine.is_shut_down`."""
        return self._llm is None

    def paused(self, write: Callable[[], None]) -> None:
        """See `InPlaceEngine.paused`."""
        core = self._llm.engine_core.engine_core
        # Not `as_guest`: nothing in here draws random numbers, and to keep their states takes a fifth of a
        # small push.
        with torch.no_grad(), vllm_process.torch_for_vllm():
            core.pause_scheduler(mode="keep", clear_cache=True)
            try:
                self._worker.start_weight_update()
                self._worker.update_weights({"write": write})
                self._worker.finish_weight_update()
            finally:
                core.resume_scheduler()

    def load_weights(self, named: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        """See `RolloutEngine.load_weights`; tensors of any float dtype, cast to the engine's."""
        self.void()
        with torch.no_grad():
            # The trainer's own code may run inside this iteration: vLLM's torch must not be in place yet.
            self._loader.load(named)
        with vllm_process.as_guest():
            self._derive()
            self._reset_prefix_cache()
        self.accept(policy_version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int
    ) -> list[Completion]:
        """See `RolloutEngine.generate`.

        Log-probabilities of greedy completions are those at temperature 1. RolloutError when a prompt does
        not fit, when ranks of the engine were asked for or got different things, or when a log-probability
        is not finite.
        """
        version = self.policy_version
        check_request(prompts, sampling, max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        self._check_agreement("requests", [(p.prompt_id, p.tokens) for p in prompts], sampling, seed)
        if not prompts:
            return []
        with vllm_process.as_guest(), self._voided_on_error():
            # What an earlier call has cached would change how this one's prompts are cut up, and so its
            # rounding: the same call must give the same numbers.
            self._reset_prefix_cache()
            outputs = self._sample(prompts, sampling, seed, version)
        completions = [
            completion_of(output, prompt, index, sampling, policy_version=version, decode=self._decode)
            for (prompt, index), output in zip(requests(prompts, sampling), outputs, strict=True)
        ]
        self._check_agreement("completions", [completion.tokens for completion in completions])
        return completions

    def shutdown(self) -> None:
        """See `InPlaceEngine.shutdown`."""
        if self._llm is None:
            return
        with vllm_process.as_guest():
            core = self._llm.engine_core.engine_core
            # The core's own shutdown would destroy torch.distributed too.
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            vllm_process.release_groups()
        self._llm = self._model = self._worker = None
        self._loader = self._group = None  # type: ignore[assignment]
        self._places = Places({}, {})
        self._derived = []
        self.close_shared()
        self.void()
        gc.unfreeze()
        gc.collect()

    def _sample(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, seed: int, version: int
    ) -> list[Any]:
        first = self._num_requests
        for prompt, index in requests(prompts, sampling):
            each = completion_seed(
                seed=seed, policy_version=version, prompt_id=prompt.prompt_id, sample_index=index
            )
            self._llm.add_request(
                str(self._num_requests),
                {"type": "token", "prompt_token_ids": list(prompt.tokens)},
                sampling_params(sampling, each),
            )
            self._num_requests += 1
        finished: dict[int, Any] = {}
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                if output.finished:
                    finished[int(output.request_id)] = output
        expected = range(first, self._num_requests)
        if finished.keys() != set(expected):
            raise RolloutError(f"{len(expected)} completions were asked for and {len(finished)} came back")
        return [finished[request] for request in expected]

    @contextmanager
    def _voided_on_error(self) -> Iterator[None]:
        """What vLLM left half done cannot be trusted: after an error the engine refuses to go on."""
        try:
            yield
        except Exception as error:
            self.void()
            raise RolloutError(f"vLLM failed while sampling: {type(error).__name__}: {error}") from error

    def _check_agreement(self, what: str, *values: object) -> None:
        """RolloutError unless all ranks of this engine hold equal ``values``; collective over the engine."""
        if self._spec.tp == 1:
            return
        digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
        (number,) = struct.unpack("<q", digest)
        bounds = torch.tensor([number, ~number])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        if bounds[0] != ~bounds[1]:
            raise RolloutError(f"ranks of engine {self.replica_index} have different {what}")

    def _derive(self) -> None:
        """Compute what is derived from the live weights."""
        for compute in self._derived:
            compute()

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not reset its prefix cache: some request still holds it")


def _pack_blocks(isa: str, source: Tensor, target: Tensor) -> None:
    # What vLLM's own `cpu_prepack_moe_weight` calls, on memory that is there.
    torch.ops._C.prepack_moe_weight(source, target, isa)
