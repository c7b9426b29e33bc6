"""What vLLM's own loaders read for one shard of an engine of any size, in one process.

vLLM asks a few objects which rank this is and of how many; here they are answered, its model is built for
that rank, and its loader is recorded (``loader_record.py``). Nothing is communicated.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist

from mtrl.models.config import ModelConfig
from mtrl.models.stages import Stages
from mtrl.models.transfers import Boxes
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import RolloutSpec, parse_training_spec
from mtrl.rollout import vllm_build, vllm_mends, vllm_process
from mtrl.rollout.loader_record import LoaderRecord, record_loader
from mtrl.weight_push.kinds import Engines, alike_of, kinds_of
from tests.property.node_bounds import masks

CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")


class Group:
    """A process group, and vLLM's wrapper of one, as far as building and loading a model asks it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank_in_group = self.local_rank = rank
        self.world_size = size
        self.ranks = list(range(size))
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1
        self.device_group = self.cpu_group = self
        self.device = torch.device("cpu")
        self.device_communicator = None

    def rank(self) -> int:
        return self.rank_in_group

    def size(self) -> int:
        return self.world_size


def prepare() -> None:
    """Once in a process whose WORLD is one rank."""
    vllm_process.prepare_environment()
    vllm_process.quiet_log()
    vllm_mends.install()


@contextmanager
def no_fp8_kernels() -> Iterator[None]:
    """vLLM builds layers with FP8 weights where it has no kernel that multiplies with them: the choice is
    answered as on a GPU, and nothing that was chosen is called.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8

    kernel = TritonFp8BlockScaledMMKernel.__new__(TritonFp8BlockScaledMMKernel)
    with (
        patch.object(fp8, "init_fp8_linear_kernel", lambda **config: kernel),
        patch.object(fp8, "select_fp8_moe_backend", lambda **config: (Fp8MoeBackend.TRITON, None)),
    ):
        yield


def shard_models(
    folder: Path, engines: Engines, ranks: Sequence[int], dtype: Literal["float32", "fp8"] = "float32"
) -> Iterator[tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """vLLM's model of each of these ranks of an engine, built with the config that `VllmEngine` gives vLLM,
    and its live tensors.
    """
    import vllm.distributed.parallel_state as state
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    tp, compute = engines.spec.tp, vllm_build.compute_dtype(dtype)
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(tp), "LOCAL_RANK": "0"}
    config = EngineArgs(
        model=str(folder), runner="generate", skip_tokenizer_init=True, load_format="dummy", dtype=compute,
        tensor_parallel_size=tp, distributed_executor_backend="external_launcher",
        enable_expert_parallel=engines.expert_parallel, max_model_len=64, max_num_seqs=8, enforce_eager=True,
        kv_cache_memory_bytes=16 << 20, hf_overrides=vllm_build.overrides(folder, fp8=dtype == "fp8"),
    ).create_engine_config()  # fmt: skip
    for engine_rank in ranks:
        for name in ("_WORLD", "_TP", "_EP"):
            setattr(state, name, Group(engine_rank, tp))
        for name in ("_PP", "_DP", "_PCP", "_DCP", "_ETP", "_EPLB"):
            setattr(state, name, Group(0, 1))
        config.parallel_config.rank = engine_rank
        config.compilation_config.static_forward_context.clear()  # where layers write down their names
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(getattr(torch, compute)),
            no_fp8_kernels(),
        ):
            model = initialize_model(config)
            for module in model.modules():
                for name in CACHE_SCALES:  # vLLM's own step after loading removes them
                    module._parameters.pop(name, None)
            destinations = {name: buffer for name, buffer in model.named_buffers() if buffer.is_contiguous()}
            yield model, destinations | {name: p.data for name, p in model.named_parameters()}


def record_shards(folder: Path, engines: Engines, shapes: dict[str, Any]) -> Iterator[LoaderRecord]:
    """The record of the loader of each rank of an engine."""
    for model, destinations in shard_models(folder, engines, range(engines.spec.tp)):
        yield record_loader(model.load_weights, shapes, destinations, torch.float32)


def ruled_needs(config: ModelConfig, engines: Engines) -> list[Boxes]:
    """What each rank of the first engine needs by the ranges of ``kinds.py``."""
    layout = RankLayout.from_spec(parse_training_spec(f"megatron:d{engines.spec.world_size}"))
    kinds = kinds_of(config, layout, engines, Stages.balanced(config.num_layers, 1), 2)
    found: list[dict[str, Any]] = [{} for _ in range(engines.spec.tp)]
    for alike in alike_of(kinds, layout, engines):
        for box, ranks in alike.need.items():
            for name in alike.names:
                for rank in ranks:
                    if rank < engines.spec.tp:
                        found[rank][name] = (*found[rank].get(name, ()), box)
    return list(found)


def differing(record: LoaderRecord, ruled: Boxes, shapes: dict[str, Any]) -> list[str]:
    """The tensors of which a loader's record and the ranges name different elements."""
    from mtrl.weight_push.plan import Needs

    recorded, expected = masks(Needs.of(record).boxes, shapes), masks(ruled, shapes)
    return [name for name in shapes if not (recorded[name] == expected[name]).all()]


def engine_needs(folder: str, toys: list[str], rollout: dict[str, Any]) -> dict[str, list[str]]:
    """On every rank of a real engine, by toy: the tensors of which its record and the ranges differ."""
    from mtrl.models.families import load_model_config
    from mtrl.rollout.vllm_engine import VllmEngine

    spec = RolloutSpec(backend="vllm", dp=rollout["dp"], tp=rollout["tp"])
    engines = Engines(spec=spec, expert_parallel=rollout["expert_parallel"])
    found = {}
    for toy in toys:
        path = Path(folder) / toy
        config = load_model_config(path)
        shapes = shapes_of(config)
        engine = VllmEngine.create(
            path, spec, max_model_len=64, max_num_seqs=8, dtype="float32", seed=0, kv_cache_bytes=16 << 20,
            expert_parallel=engines.expert_parallel,
        )  # fmt: skip
        record = engine.plan_weights(shapes, {})
        found[toy] = differing(record, ruled_needs(config, engines)[dist.get_rank() % spec.tp], shapes)
        engine.shutdown()
    return found


def shapes_of(config: ModelConfig) -> dict[str, Any]:
    """Every tensor of the published format."""
    layout = RankLayout.from_spec(parse_training_spec("megatron:d1"))
    engines = Engines(spec=RolloutSpec(backend="vllm"))
    kinds = kinds_of(config, layout, engines, Stages.balanced(config.num_layers, 1), 2)
    return {name: kind.shape for kind in kinds for name in kind.all_names()}
