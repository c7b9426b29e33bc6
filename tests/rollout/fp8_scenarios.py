"""What ranks run for the tests of engines with FP8 weights, on machines that have no kernels for them.

vLLM's real models are built and its real loaders run; only the choice of kernels is answered
(``shard_records.py``), and nothing is sampled.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.models.backends.torch_native.fp8 import SQUARE, error_bound, quantise
from mtrl.models.boxes import Box
from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.models.hf_folder import SCALE_SUFFIX
from mtrl.models.quantized import DequantizedSource
from mtrl.models.transfers import Boxes
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.errors import RolloutError
from mtrl.parallel.spec import RolloutSpec, parse_rollout_spec, parse_training_spec
from mtrl.rollout import fp8_weights, vllm_layouts
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.loader_record import LoaderRecord, record_loader
from mtrl.rollout.weight_loading import WeightLoader
from mtrl.weight_push.kinds import Engines
from mtrl.weight_push.plan import Needs
from tests.property.node_bounds import masks
from tests.rollout import shard_records
from tests.rollout.toys import ENGINE_TOYS
from tests.unit.test_family_configs import written

SIZES: dict[str, Any] = {
    "vocab_size": 250, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 256,
    "max_position_embeddings": 512,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 8, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
           "v_head_dim": 64, "head_dim": 64}  # fmt: skip
TOYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2 moe": {"shared_expert_intermediate_size": 256},
    "qwen3": {},
    "qwen3 moe": {},
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 8},
    "glm4 moe": {},
    "moonlight": _LATENT,
    "deepseek v3": {
        **_LATENT,
        "q_lora_rank": 256,
        "rope_parameters": ENGINE_TOYS["deepseek v3"]["rope_parameters"],
    },
}
ENGINES = ((1, False), (2, False), (2, True))


def write_config(folder: Path, toy: str, **fields: Any) -> ModelConfig:
    """Write a toy's ``config.json`` in sizes of whole FP8 blocks, but for ``fields``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written(toy, **{**SIZES, **TOYS[toy], **fields})))
    return load_model_config(folder)


def record_fp8(folder: str) -> dict[str, Any]:
    """By toy and engine: what is wrong with the records of any of its ranks."""
    shard_records.prepare()
    found: dict[str, Any] = {}
    for toy in TOYS:
        path = Path(folder) / toy
        config = write_config(path, toy)
        for tp, expert_parallel in ENGINES if config.moe else ENGINES[:2]:
            engines = Engines(spec=RolloutSpec(backend="vllm", tp=tp), expert_parallel=expert_parallel)
            faults = [
                fault
                for model, destinations in shard_records.shard_models(path, engines, range(tp), "fp8")
                for fault in _faults(model, destinations, config)
            ]
            found[f"{toy} {tp} {expert_parallel}"] = sorted(set(faults))
    found["rows of up"] = _rows_of_up(Path(folder) / "cut")
    found["other kernels"] = _refusals_of_kernels(Path(folder) / "qwen3 moe")
    return found


def _rows_of_up(path: Path) -> list[int]:
    """Of an MLP of 480, where in the merged linear the weights of `up` begin, and its scales."""
    config = write_config(path, "llama", intermediate_size=480)
    engines = Engines(spec=RolloutSpec(backend="vllm"))
    ((model, destinations),) = shard_records.shard_models(path, engines, [0], "fp8")
    record = _recorded(model, destinations, config)
    up = "model.layers.0.mlp.up_proj.weight"
    width = {copy.source: destinations[copy.destination].shape[-1] for copy in record.copies}
    rows = {copy.source: copy.destination_region.offset // width[copy.source] for copy in record.copies}
    return [rows[up], rows[up + SCALE_SUFFIX]]


def _refusals_of_kernels(path: Path) -> list[str]:
    """What is said where vLLM took another kernel for a linear, or for experts, than it was told to."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

    engines = Engines(spec=RolloutSpec(backend="vllm"))
    ((model, _),) = shard_records.shard_models(path, engines, [0], "fp8")
    vllm_layouts.check_fp8_kernels(model)
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    said = []
    for kind, field, other in (
        ("Fp8LinearMethod", "fp8_linear", None),
        ("Fp8MoEMethod", "fp8_backend", Fp8MoeBackend.DEEPGEMM),
    ):
        last = [method for method in methods if type(method).__name__ == kind][-1]
        real = getattr(last, field)
        setattr(last, field, other)
        try:
            vllm_layouts.check_fp8_kernels(model)
        except RolloutError as error:
            said.append(str(error))
        setattr(last, field, real)
    return said


def _recorded(model: Any, destinations: Mapping[str, Tensor], config: ModelConfig) -> LoaderRecord:
    names = fp8_weights.fp8_names(config)
    shapes = fp8_weights.with_scales(shard_records.shapes_of(config), names)
    dtypes = fp8_weights.fp8_dtypes(names)
    return record_loader(model.load_weights, shapes, destinations, torch.bfloat16, dtypes)


def _faults(model: Any, destinations: Mapping[str, Tensor], config: ModelConfig) -> Iterator[str]:
    record, names = _recorded(model, destinations, config), fp8_weights.fp8_names(config)
    shapes = dict(record.sources)
    parameters = {name for name, _ in model.named_parameters()}
    record.check_complete(destinations, [n for n in parameters if not n.endswith((".W_UV", ".W_UK_T"))])
    expected = fp8_weights.fp8_dtypes(names)
    for copy in record.copies:
        there = destinations[copy.destination].dtype
        if there != expected.get(copy.source, there) or (
            there == torch.float8_e4m3fn and copy.source not in expected
        ):
            yield f"{copy.source} goes to {copy.destination}, {there}"
    needs = Needs.of(record)
    reads = masks(needs.boxes, shapes)
    for name in names:
        blocks = masks({"": tuple(map(fp8_weights.block_box, needs.boxes.get(name, ())))},
                       {"": shapes[name + SCALE_SUFFIX]})[""]  # fmt: skip
        if not (blocks == reads[name + SCALE_SUFFIX]).all():
            yield f"{name} is read in other blocks than its scales"


class ShardEngine(InPlaceEngine):
    """This rank's shard of vLLM's model, and mtrl's real loader of it: a `VllmEngine` to a push, which
    cannot sample.
    """

    is_shut_down = False

    def __init__(self, folder: Path, engines: Engines, group: dist.ProcessGroup) -> None:
        place = dist.get_rank() % engines.spec.tp
        ((self.model, _),) = shard_records.shard_models(folder, engines, [place], "fp8")
        self._loader = WeightLoader(self.model, torch.bfloat16, group)
        super().__init__(spec=engines.spec, places=self._loader.places, has_fp8_weights=True)

    def live_parameters(self) -> list[tuple[Mapping[str, Tensor], str]]:
        return [
            (module._parameters, name)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def plan_weights(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> LoaderRecord:
        return self._loader.prepare(shapes, dtypes)

    @property
    def loader_record(self) -> LoaderRecord | None:
        return self._loader.record

    def paused(self, write: Callable[[], None]) -> None:
        write()

    def generate(self, prompts: object, sampling: object, *, seed: int) -> NoReturn:
        raise NotImplementedError("vLLM has no kernels for it here")

    sleep = wake = shutdown = generate  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Case:
    """A train layout against an engine layout; ``fields`` of the config differ from `SIZES`."""

    toy: str
    actor: str
    rollout: str
    expert_parallel: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"
    cut: bool = False
    """Heads and experts of sizes that trainers split within blocks."""
    transport: Literal["auto", "collective"] = "auto"

    @property
    def name(self) -> str:
        flags = [self.precision, *(["apart"] if self.expert_parallel else []), *(["cut"] if self.cut else [])]
        return " ".join([self.toy, self.actor, self.rollout, *flags])


CASES = {
    2: (
        Fp8Case(toy="qwen3 moe", actor="megatron:t2", rollout="vllm:d2"),
        Fp8Case(toy="qwen3 moe", actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:t2", precision="fp32"),
        Fp8Case(toy="qwen3 moe", actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:t2", expert_parallel=True),
        Fp8Case(toy="llama", actor="megatron:p2", rollout="vllm:d2", transport="collective"),
        Fp8Case(toy="qwen3 moe", actor="megatron:(attn:t2|ffn:t2)", rollout="vllm:d2", cut=True),
        Fp8Case(toy="glm4 moe", actor="megatron:(attn:t2|ffn:e2)", rollout="vllm:d2", cut=True,
                precision="fp32", transport="collective"),
        Fp8Case(toy="deepseek v3", actor="megatron:(attn:d2|ffn:t2)", rollout="vllm:t2"),
    ),
    4: (
        Fp8Case(toy="qwen3 moe", actor="megatron:(attn:d2t2|ffn:t2e2)", rollout="vllm:d4", cut=True),
        Fp8Case(toy="qwen3 moe", actor="megatron:(attn:p2t2|ffn:p2e2)", rollout="vllm:d2t2"),
    ),
}  # fmt: skip
CUT = {"num_attention_heads": 6, "num_key_value_heads": 2, "moe_intermediate_size": 384}


def pushes(folder: str) -> dict[str, Any]:
    """Every case of this world's size."""
    shard_records.prepare()
    cases = CASES[dist.get_world_size()]
    return {case.name: push_case(case, Path(folder) / str(number)) for number, case in enumerate(cases)}


def push_case(case: Fp8Case, folder: Path) -> dict[str, Any]:
    """Two pushes with other weights; after each, what of the engine is not what vLLM's loader makes of full
    tensors quantised here.
    """
    from mtrl.models.builder import build_model
    from mtrl.models.hf import initialize
    from mtrl.parallel import groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.weight_push.push import WeightPush

    if dist.get_rank() == 0:
        write_config(folder, case.toy, **(CUT if case.cut else {}))
    dist.barrier()
    config = load_model_config(folder)
    parallel = groups.create(RankLayout.from_spec(parse_training_spec(case.actor)))
    groups.seed_everything(1, parallel)
    model = build_model(config, parallel, precision=case.precision)
    initialize(model, seed=3)
    spec = parse_rollout_spec(case.rollout)
    replicas = [dist.new_group(list(range(at, at + spec.tp))) for at in range(0, spec.world_size, spec.tp)]
    engine: Any = ShardEngine(
        folder,
        Engines(spec=spec, expert_parallel=case.expert_parallel),
        replicas[dist.get_rank() // spec.tp],
    )
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    push = WeightPush(model, engine, torch.bfloat16, bucket_bytes=1 << 20, num_verified=1,
                      transport=case.transport)  # fmt: skip
    received, faults = [], []
    for version in (1, 2):
        received.append(push.run(policy_version=version))
        faults += differing(model, engine)
        with torch.no_grad():
            for parameter in model.parameters().values():
                parameter.mul_(0.7)
    weights, told = bounds(model, engine, push)
    found = {
        "faults": faults, "received": received, "bound": weights + told, "told": told,
        "unquantised": gather_json(num_lacking_bytes(model, engine, {}, case.precision)),
        "transport": push.transport.name, "kept": push.extra_bytes,
    }  # fmt: skip
    groups.destroy()
    return found


def differing(model: Any, engine: ShardEngine) -> list[str]:
    """Live tensors that are not bit for bit what vLLM's own loader leaves, given full tensors that were
    quantised whole; and what of those `DequantizedSource` reads beyond the format's bound.
    """
    from mtrl.models.gather import TensorGather

    names = tuple(model.weight_map.hf_shapes())
    dtype = next(iter(model.parameters().values())).dtype
    world_size = dist.get_world_size()
    full = dict(TensorGather(model, [names] * world_size).run(dtype))
    files = dict(full)
    for name in fp8_weights.fp8_names(model.weight_map.config):
        files[name], files[name + SCALE_SUFFIX] = quantise(full[name], SQUARE)
    live = {name: parameter.data for name, parameter in engine.model.named_parameters()}
    pushed = {name: tensor.clone() for name, tensor in live.items()}
    for tensor in live.values():
        tensor.zero_()
    engine.model.load_weights(iter(files.items()))
    found = [name for name, tensor in live.items() if not _same_bits(tensor, pushed[name])]
    source = DequantizedSource(_InMemory(files), SQUARE)
    for name in fp8_weights.fp8_names(model.weight_map.config):
        read = source.read(name, Box.full(full[name].shape)).double()
        # Reading rounds to bf16: half of its last place of 8 bits, of what is read.
        bound = error_bound(full[name], SQUARE) + 2.0**-8 * read.abs()
        if not bool(((read - full[name].double()).abs() <= bound).all()):
            found.append(f"{name} as it is read")
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and _bits(one).equal(_bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


class _InMemory:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return self._tensors[name][box.slices]


def bounds(model: Any, engine: ShardEngine, push: Any) -> tuple[int, int]:
    """Bytes that this rank cannot do without: of weights and scales that its engine reads and its trainer
    does not hold; and of the largest magnitudes of blocks that it quantises a part of and others the rest.
    """
    from mtrl.models.gather import held_boxes

    names = fp8_weights.fp8_names(model.weight_map.config)
    rank, held = dist.get_rank(), held_boxes(model.weight_map)
    told = 0
    for name in names:
        if not any(
            each.source == rank and each.name in (name, name + SCALE_SUFFIX)
            for each in push.plan.first.transfers
        ):
            continue
        own = set(held[rank].get(name, ()))
        for other in {box for boxes in held for box in boxes.get(name, ())} - own:
            shared = {block for box in own for block in _blocks(box) & _blocks(other)}
            told += 4 * len(shared)
    return num_lacking_bytes(model, engine, fp8_weights.fp8_dtypes(names), "bf16"), told


def _blocks(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(*each) for each in fp8_weights.block_box(box).ranges)))


def num_lacking_bytes(
    model: Any, engine: ShardEngine, dtypes: Mapping[str, torch.dtype], precision: str
) -> int:
    """Bytes of what the engine reads and the trainer's rank does not hold; ``dtypes`` is what is not in the
    trainer's precision, and scales count where they are named there.
    """
    from mtrl.models.gather import held_boxes

    assert engine.loader_record is not None
    shapes = dict(engine.loader_record.sources)
    held: Boxes = held_boxes(model.weight_map)[dist.get_rank()]
    scales = {
        name + SCALE_SUFFIX: tuple(map(fp8_weights.block_box, boxes))
        for name, boxes in held.items()
        if name + SCALE_SUFFIX in shapes
    }
    reads, has = masks(Needs.of(engine.loader_record).boxes, shapes), masks({**held, **scales}, shapes)
    kept = {name: torch.float32 for name, dtype in model.weight_map.hf_dtypes().items() if dtype == "float32"}
    usual = torch.float32 if precision == "fp32" else torch.bfloat16
    return sum(
        int((reads[name] & ~has[name]).sum()) * {**kept, **dtypes}.get(name, usual).itemsize
        for name in shapes
        if name in dtypes or not name.endswith(SCALE_SUFFIX)
    )
