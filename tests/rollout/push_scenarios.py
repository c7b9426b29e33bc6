"""What ranks run for the tests of the push: train layouts against engine layouts, three updates each."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.batch import Completion, Prompt
from mtrl.config_engines import OptimizerSection
from mtrl.exchange import max_over_ranks
from mtrl.models.backends import Backend
from mtrl.models.builder import Model, build_model
from mtrl.models.families import family_of, load_model_config
from mtrl.models.gather import held_boxes
from mtrl.models.hf import export_hf, initialize, load_hf
from mtrl.objectives import SftLoss
from mtrl.parallel import groups
from mtrl.parallel.agreement import gather_json
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from mtrl.policy import Microbatch, make_microbatches
from mtrl.rl import to_samples
from mtrl.rollout.in_place import InPlaceEngine
from mtrl.rollout.own_process import OwnProcessEngine
from mtrl.rollout.protocol import SamplingSettings
from mtrl.rollout.sampler import sample_on_all
from mtrl.rollout.vllm_engine import VllmEngine
from mtrl.trainer import Trainer
from mtrl.weight_push.push import WeightPush
from mtrl.weight_push.transport import TransportName
from tests.family_toys import build_family_toy, save
from tests.rollout.toys import DENSE_TOYS, ENGINE_SIZES, ENGINE_TOYS, logprob_difference, toy_prompts
from tests.toys import build_toy, write_folder

NUM_UPDATES = 3
# The long prompt spans two blocks of 128 tokens of the prefix cache: a stale block would show.
PROMPTS = toy_prompts(5, 19, 33, 150)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A train layout against an engine layout; what is not named is as in most runs."""

    actor: str
    rollout: str
    kind: str = "moe"
    toy: str = ""
    """One of the families' toys, in place of ``kind``."""
    tied: bool = False
    num_chunks: int = 1
    expert_parallel: bool = False
    temperature: float = 1.0
    nodes: tuple[int, ...] = ()
    transport: TransportName = "auto"
    backend: Backend = "torch_native"
    process: Literal["trainer", "own"] = "trainer"

    @property
    def name(self) -> str:
        """A short description for test names."""
        flags = [
            *([self.toy] if self.toy else []),
            *(["dense"] if self.kind == "dense" else []),
            *(["tied"] if self.tied else []),
            *([f"vpp{self.num_chunks}"] if self.num_chunks > 1 else []),
            *(["expert_parallel"] if self.expert_parallel else []),
            *([f"temperature{self.temperature}"] if self.temperature != 1.0 else []),
            *([f"nodes{''.join(map(str, self.nodes))}"] if self.nodes else []),
            *([self.transport] if self.transport != "auto" else []),
            *([self.backend] if self.backend != "torch_native" else []),
            *(["own process"] if self.process == "own" else []),
        ]
        return " ".join([self.actor, self.rollout, *flags])


CASES = {
    2: (
        Case(actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:d2"),
        Case(actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:t2", expert_parallel=True, temperature=0.7),
        Case(actor="megatron:t2", rollout="vllm:d2", tied=True),
        Case(actor="megatron:p2", rollout="vllm:t2", num_chunks=2, transport="collective"),
        Case(actor="megatron:(attn:d2|ffn:e2)", rollout="vllm:d2", process="own"),
    ),
    4: (
        Case(actor="megatron:(attn:d2t2|ffn:e4)", rollout="vllm:d2t2", expert_parallel=True),
        Case(actor="megatron:(attn:p2t2|ffn:p2e2)", rollout="vllm:d4", nodes=(0, 0, 1, 1)),
    ),
}

MORE_CASES = (
    Case(actor="megatron:(attn:t2|ffn:e2)", rollout="vllm:t2"),
    Case(actor="megatron:p2", rollout="vllm:d2", tied=True),
    Case(actor="megatron:d2", rollout="vllm:t2", kind="dense", tied=True),
)
"""Of two ranks, in the matrix alone."""


def _matrix() -> dict[int, tuple[Case, ...]]:
    """Every family from trainers of two, four and eight ranks to engines of other layouts."""
    mixture = {
        2: (
            ("megatron:(attn:d2|ffn:e2)", "vllm:t2", False),
            ("megatron:(attn:t2|ffn:t2)", "vllm:d2", False),
            ("megatron:(attn:t2|ffn:e2)", "vllm:t2", True),
        ),
        4: (("megatron:(attn:p2t2|ffn:p2e2)", "vllm:d2t2", True),),
        8: (("megatron:(attn:d2p2t2|ffn:p2e4)", "vllm:d4t2", False),),
    }
    dense = {
        2: (("megatron:d2", "vllm:t2", False), ("megatron:t2", "vllm:d2", False)),
        4: (("megatron:p2t2", "vllm:d2t2", False),),
        8: (("megatron:d2p2t2", "vllm:d4t2", False),),
    }
    found: dict[int, list[Case]] = {2: [], 4: [], 8: []}
    for toy in ENGINE_TOYS:
        for size, rows in (dense if toy in DENSE_TOYS else mixture).items():
            for actor, rollout, expert_parallel in rows:
                if toy == "gpt oss":  # vLLM's CPU build slices no experts that have biases
                    rollout, expert_parallel = f"vllm:d{size}", False
                case = Case(actor=actor, rollout=rollout, toy=toy, expert_parallel=expert_parallel)
                if case not in found[size]:
                    found[size].append(case)
    more = {2: MORE_CASES}
    return {size: (*CASES.get(size, ()), *more.get(size, ()), *cases) for size, cases in found.items()}


MATRIX = _matrix()


def matrix(folder: str) -> dict[str, Any]:
    """The cases of `MATRIX` for this world's size; what one met in place of its numbers."""
    found: dict[str, Any] = {}
    for number, case in enumerate(MATRIX[dist.get_world_size()]):
        found[case.name] = run_case(case, Path(folder) / str(number))
        if dist.get_rank() == 0:
            print(case.name, flush=True)
    return found


def pushes(folder: str) -> dict[str, Any]:
    """Every case of this world's size, one after the other in the same processes."""
    return {case.name: run_case(case, Path(folder) / str(n)) for n, case in enumerate(_cases())}


def _cases() -> tuple[Case, ...]:
    return CASES[dist.get_world_size()]


def open_case(case: Case, folder: Path) -> tuple[Model, Trainer, InPlaceEngine, WeightPush]:
    """Trainer, engine and push of a case. Collective over WORLD."""
    config = _family_folder(case, folder) if case.toy else _config_folder(case, folder)
    parallel = groups.create(
        RankLayout.from_spec(parse_training_spec(case.actor)), virtual_pipeline_size=case.num_chunks
    )
    groups.seed_everything(1, parallel)
    model = build_model(config, parallel, num_chunks=case.num_chunks, backend=case.backend)
    load_hf(model, folder) if case.toy else initialize(model, seed=3)
    trainer = Trainer(model, OptimizerSection(lr=0.02, beta2=0.99), temperature=case.temperature)
    trainer.start_phase(total_steps=NUM_UPDATES, lr=0.02, warmup_steps=0)
    kind: type[VllmEngine] | type[OwnProcessEngine]
    kind = VllmEngine if case.process == "trainer" else OwnProcessEngine
    engine: InPlaceEngine = kind.create(
        folder, parse_rollout_spec(case.rollout), max_model_len=200, max_num_seqs=32, dtype="float32", seed=0,
        kv_cache_bytes=16 << 20, expert_parallel=case.expert_parallel,
    )  # fmt: skip
    # Several rounds share a bucket.
    push = WeightPush(
        model, engine, torch.float32, bucket_bytes=1 << 15, transport=case.transport,
        num_verified=NUM_UPDATES - 1, node_of=list(case.nodes) or None,
    )  # fmt: skip
    return model, trainer, engine, push


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Push, sample, compare with trainer and transformers, update; three times."""
    model, trainer, engine, push = open_case(case, folder)
    found = [
        _update(case, folder / f"v{version}", version, model, trainer, engine, push)
        for version in range(1, NUM_UPDATES + 1)
    ]
    nodes = list(case.nodes) or [0] * dist.get_world_size()
    found_here = {
        "updates": found,
        "lacking_bytes": 4 * num_lacking(model, engine),
        "lacking_on_node": 4 * num_lacking_on_node(model, engine, nodes),
        "across": gather_json(push.counts.bytes_across),
        "rounds": push.counts.num_rounds / NUM_UPDATES,
        "transport": push.transport.name,
        "buckets": push.allocated_bucket_bytes,
    }
    engine.shutdown()
    groups.destroy()
    return found_here


def _update(
    case: Case,
    folder: Path,
    version: int,
    model: Model,
    trainer: Trainer,
    engine: InPlaceEngine,
    push: WeightPush,
) -> dict[str, Any]:
    sampling = SamplingSettings(
        temperature=case.temperature, top_p=1.0, max_new_tokens=8, num_samples=2, stop_token_ids=()
    )
    with counted_calls() as calls:
        received = push.run(policy_version=version)
    completions = sample_on_all(engine, PROMPTS, sampling, seed=5)
    samples = to_samples(PROMPTS, completions, [0.0] * len(completions))
    batch = make_microbatches(samples, model, max_tokens=200, pad_token_id=0)
    logprobs = trainer.policy.logprobs(batch)
    export_hf(model, folder)
    trainer.step(batch, SftLoss())
    sampled = [each.packed.sampler_logprobs_T for each in batch]
    return {
        "trainer": _largest_difference(batch, logprobs, sampled),
        "moved": _largest_difference(batch, trainer.policy.logprobs(batch), sampled),
        "transformers": _transformers_difference(case, folder, completions) if dist.get_rank() == 0 else 0.0,
        "versions": sorted({each.policy_version for each in completions}),
        "tokens": [list(each.tokens) for each in completions],
        "received": received,
        "calls": calls.total(),
    }


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """How many functions Python calls inside, its own and built-in ones."""
    calls: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update((event,)))
    try:
        yield calls
    finally:
        sys.setprofile(None)
        calls.pop("return", 0), calls.pop("c_return", 0), calls.pop("c_exception", 0)


def _largest_difference(batch: list[Microbatch], left: list[Tensor], right: list[Tensor]) -> float:
    """Over the trained tokens of all ranks."""
    worst = 0.0
    for each, left_T, right_T in zip(batch, left, right, strict=True):
        difference_T = (left_T - right_T)[each.packed.loss_mask_T].abs()
        worst = max(worst, float(difference_T.max()) if difference_T.numel() else 0.0)
    return max_over_ranks(worst)


def _transformers_difference(case: Case, folder: Path, completions: list[Completion]) -> float:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts: list[Prompt] = list(PROMPTS)
    return logprob_difference(reference, prompts, completions, temperature=case.temperature)


def _config_folder(case: Case, folder: Path) -> Any:
    """Write the toy's config with four layers, so that two virtual stages of two ranks have one each."""
    if dist.get_rank() == 0:
        write_folder(build_toy("dense" if case.kind == "dense" else "moe", seed=0, tied=case.tied), folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 4, "max_window_layers": 4, "layer_types": ["full_attention"] * 4}
        (folder / "config.json").write_text(json.dumps(config))
    dist.barrier()
    hf_config = json.loads((folder / "config.json").read_text())
    return family_of(hf_config).read_config(hf_config)


def _family_folder(case: Case, folder: Path) -> Any:
    """Write a family's toy, in sizes that vLLM's kernels for CPUs take."""
    if dist.get_rank() == 0:
        save(build_family_toy(case.toy, seed=2, **{**ENGINE_SIZES, **ENGINE_TOYS[case.toy]}), folder)
    dist.barrier()
    return load_model_config(folder)


def num_lacking(model: Model, engine: InPlaceEngine) -> int:
    """Elements that this rank's engine reads and its trainer does not hold, counted one by one."""
    held = held_boxes(model.weight_map)[model.groups.rank]
    count = 0
    for name, lacks in _read_elements(model, engine):
        for box in held.get(name, ()):
            lacks[box.slices] = False
        count += int(lacks.sum())
    return count


def num_lacking_on_node(model: Model, engine: InPlaceEngine, nodes: list[int]) -> int:
    """Elements that some engine of this rank's node reads and none of its trainers holds."""
    held, own = held_boxes(model.weight_map), nodes[model.groups.rank]
    count = 0
    for name, lacks in _read_elements(model, engine):
        dist.all_reduce(everyones := _by_node(lacks, own), op=dist.ReduceOp.MAX)
        lacks = everyones[own].bool()
        for rank, node in enumerate(nodes):
            for box in held[rank].get(name, ()) if node == own else ():
                lacks[box.slices] = False
        count += int(lacks.sum())
    return count


def _by_node(lacks: Tensor, node: int) -> Tensor:
    rows = torch.zeros((dist.get_world_size(), *lacks.shape), dtype=torch.uint8)
    rows[node] = lacks
    return rows


def _read_elements(model: Model, engine: InPlaceEngine) -> Iterator[tuple[str, Tensor]]:
    """By tensor, which elements this rank's engine reads; what is read otherwise than as a box counts
    whole.
    """
    record = engine.loader_record
    assert record is not None
    for name, shape in model.weight_map.hf_shapes().items():
        reads = torch.zeros(shape, dtype=torch.bool)
        for copy in record.copies:
            if copy.source == name:
                is_box = copy.source_region.box(shape) is not None
                copy.source_region.of(reads).fill_(True) if is_box else reads.fill_(True)
        yield name, reads
