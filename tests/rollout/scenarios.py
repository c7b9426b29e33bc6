"""What ranks run for the engine's tests; each function is one world's life and returns plain values."""

import functools
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtrl.batch import Completion, Prompt
from mtrl.parallel.errors import MtrlError
from mtrl.parallel.spec import parse_rollout_spec
from mtrl.rollout import vllm_short_paths
from mtrl.rollout.protocol import RolloutEngine, SamplingSettings
from mtrl.rollout.vllm_engine import VllmEngine
from tests.rollout.toys import logprob_difference, reference_logits, toy_prompts
from tests.toys import Kind, build_toy, hf_tensors, write_folder

SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=12, num_samples=4, stop_token_ids=())
# The two long prompts span several blocks of 128 tokens of the prefix cache: stale blocks would show.
PROMPTS = toy_prompts(5, 33, 140, 300)


def create(folder: str, kind: Kind, spec: str, *, tied: bool = False, **options: Any) -> VllmEngine:
    model_dir = Path(folder) / f"{kind}-{tied}-{dist.get_rank()}"
    write_folder(build_toy(kind, seed=0, tied=tied), model_dir, tokenizer=options.pop("tokenizer", False))
    return VllmEngine.create(
        model_dir, parse_rollout_spec(spec), max_model_len=400, max_num_seqs=32, dtype="float32", seed=0,
        kv_cache_bytes=32 << 20, **options,
    )  # fmt: skip


def three_updates(engine: RolloutEngine, kind: Kind, *, tied: bool = False) -> dict[str, Any]:
    """Differences to transformers after each of three pushes of different weights."""
    differences, tokens = [], []
    for version in range(3):
        model = build_toy(kind, seed=version, tied=tied)
        engine.load_weights(hf_tensors(model).items(), policy_version=version)
        completions = engine.generate(PROMPTS, SAMPLING, seed=11)
        differences.append(logprob_difference(model, PROMPTS, completions))
        tokens.append([completion.tokens for completion in completions])
        assert all(completion.policy_version == version for completion in completions)
    return {"differences": differences, "tokens": tokens, "order": _order(completions)}


def updates_alone(folder: str) -> dict[str, Any]:
    """World of one: every kind of model, one engine after the other; the only rank needs everything."""
    found: dict[str, Any] = {}
    cases: list[tuple[Kind, bool]] = [("dense", False), ("dense", True), ("moe", False), ("moe", True)]
    for kind, tied in cases:
        engine, name = create(folder, kind, "vllm:d1", tied=tied), f"{kind}{' tied' if tied else ''}"
        found[name] = three_updates(engine, kind, tied=tied) | needed(engine)
        found[name]["short paths"] = {} if tied else with_and_without_short_paths(engine, kind)
        engine.shutdown()
        found["distributed_survives"] = dist.is_initialized()
    return found


def left_behind() -> dict[str, int]:
    """Process groups, and threads of this process."""
    return {"groups": len(dist.distributed_c10d._world.pg_map), "threads": len(os.listdir("/proc/self/task"))}


def updates_together(folder: str) -> dict[str, Any]:
    """World of two: one engine of two ranks, in each way of cutting a model, and its refusals."""
    found: dict[str, Any] = {}
    cases: list[tuple[str, Kind, bool, bool]] = [
        ("dense", "dense", False, False), ("dense tied", "dense", True, False), ("moe", "moe", False, False),
        ("moe expert parallel", "moe", False, True), ("moe tied expert parallel", "moe", True, True),
    ]  # fmt: skip
    found["left behind"] = [left_behind()]
    for name, kind, tied, expert_parallel in cases:
        engine = create(folder, kind, "vllm:t2", tied=tied, expert_parallel=expert_parallel)
        found[name] = three_updates(engine, kind, tied=tied)
        found[name]["segments"] = [
            entry for entry in os.listdir("/dev/shm") if "mtrl" in entry or "cpushm" in entry
        ]
        found[name] |= needed(engine)
        if name in ("dense", "moe"):
            found[name]["short paths"] = with_and_without_short_paths(engine, kind)
        if name == "moe expert parallel":
            found["refusals"] = _refusals_together(engine)
        engine.shutdown()
        found["left behind"].append(left_behind())
    return found


def needed(engine: VllmEngine) -> dict[str, Any]:
    """How much of a checkpoint this rank needs."""
    record = engine.loader_record
    assert record is not None
    return {
        "elements": sum(int(np.prod(copy.source_region.shape)) for copy in record.copies),
        "used": len(record.used_sources),
        "boxes": all(copy.source_region.box(record.sources[copy.source]) for copy in record.copies),
    }


def with_and_without_short_paths(engine: VllmEngine, kind: Kind) -> dict[str, Any]:
    """Sampled with the short paths, then without, then with them after new weights."""
    engine.load_weights(hf_tensors(build_toy(kind, seed=0)).items(), policy_version=10)
    layers: dict[str, Any] = dict(engine._model.named_modules())
    shortened = [name for name, layer in layers.items() if "forward" in vars(layer)]
    short = _plain(sample(engine, seed=3))
    for name in shortened:
        del layers[name].forward
    own = _plain(sample(engine, seed=3))
    again = vllm_short_paths.install(engine._model)
    engine.load_weights(hf_tensors(build_toy(kind, seed=1)).items(), policy_version=11)
    renewed = _plain(sample(engine, seed=3))
    for name in shortened:
        del layers[name].forward
    return {
        "names": sorted({name.rpartition(".")[2] for name in shortened}),
        "same": short == own and again == shortened,
        "same after new weights": renewed == _plain(sample(engine, seed=3)),
        "moved": short != renewed,
    }


def _refusals_together(engine: VllmEngine) -> dict[str, str]:
    rank = dist.get_rank()
    weights = hf_tensors(build_toy("moe", seed=5))
    found = {"seed": refusal(lambda: engine.generate(PROMPTS[:1], SAMPLING, seed=rank))}
    partial = dict(list(weights.items())[rank:])
    found["load on one rank"] = refusal(lambda: engine.load_weights(partial.items(), policy_version=7))
    found["generate after"] = refusal(lambda: engine.generate(PROMPTS[:1], SAMPLING, seed=0))
    engine.load_weights(weights.items(), policy_version=8)
    found["version"] = str(engine.policy_version)
    return found


def replicas(folder: str) -> dict[str, Any]:
    """World of two: two engines of one rank."""
    engine = create(folder, "moe", "vllm:d2")
    engine.load_weights(hf_tensors(build_toy("moe", seed=1)).items(), policy_version=0)
    (prompt,) = toy_prompts(20)
    own = Prompt(prompt_id=100 + engine.replica_index, tokens=prompt.tokens, text="", answer="")
    return {
        "place": [engine.replica_index, engine.num_replicas, engine.engine_rank],
        "same prompt": [each.tokens for each in engine.generate([prompt], SAMPLING, seed=3)],
        "own prompt": [each.tokens for each in engine.generate([own], SAMPLING, seed=3)],
        "nothing": engine.generate([], SAMPLING, seed=3),
    }


def life_of_an_engine(folder: str) -> dict[str, Any]:
    """World of one: the laws of sampling, of random states, of refusals."""
    _stir()
    threads = torch.set_num_threads
    before = _random_states()
    started, cpu = time.monotonic(), time.process_time()
    engine = create(folder, "moe", "vllm:d1", tokenizer=True)
    found: dict[str, Any] = {"start_s": time.monotonic() - started, "start_cpu_s": time.process_time() - cpu}
    # Building the toy seeds torch's generator; only that may have changed.
    torch.set_rng_state(before["torch"])
    found["states kept by create"] = _equal(before, _random_states())
    found["no weights"] = [refusal(lambda: engine.policy_version), refusal(lambda: sample(engine, seed=1))]
    found["bad first loads"] = _bad_first_loads(engine)
    model = build_toy("moe", seed=1)
    engine.load_weights(hf_tensors(model).items(), policy_version=4)
    _stir()
    before, cpu = _random_states(), time.process_time()
    first = sample(engine, seed=1)
    found["first_generate_cpu_s"] = time.process_time() - cpu
    found["states kept by generate"] = _equal(before, _random_states())
    found["first"] = _plain(first)
    found["again"] = _plain(sample(engine, seed=1))
    found["other seed"] = _plain(sample(engine, seed=2))
    found["share"] = _plain(engine.generate(PROMPTS[1:2], SAMPLING, seed=1))
    found["texts"] = [[completion.text, len(completion.tokens)] for completion in first]
    found["torch is the trainer's"] = torch.set_num_threads is threads
    found["compiled"] = int(sum(torch._dynamo.utils.counters["frames"].values()))
    # More prompt tokens than vLLM prefills at once unless told otherwise (2048): see vllm_engine.py.
    found["crowd"] = len(engine.generate(toy_prompts(*[80] * 40), SAMPLING, seed=1)) // SAMPLING.num_samples
    found.update(_ways_to_sample(engine, model))
    found["refused requests"] = _refused_requests(engine)
    found["bad later loads"] = _bad_later_loads(engine)
    return found


def sample(engine: VllmEngine, *, seed: int) -> list[Completion]:
    return engine.generate(PROMPTS, SAMPLING, seed=seed)


def _ways_to_sample(engine: VllmEngine, model: torch.nn.Module) -> dict[str, Any]:
    prompts = toy_prompts(9, 40)
    greedy = engine.generate(prompts, _sampling(temperature=0.0, num_samples=2), seed=1)
    tops = [reference_logits(model, prompts[c.prompt_id], c).argmax(-1).tolist() for c in greedy]
    cool = engine.generate(prompts, _sampling(temperature=0.5), seed=1)
    nucleus = engine.generate(prompts, _sampling(top_p=0.3), seed=1)
    stop = cool[0].tokens[3]
    stopped = engine.generate(prompts[:1], _sampling(temperature=0.5, stop_token_ids=(stop,)), seed=1)[0]
    return {
        "greedy": [list(completion.tokens) for completion in greedy],
        "greedy of transformers": tops,
        "cool difference": logprob_difference(model, prompts, cool, temperature=0.5),
        "nucleus": [_nucleus_difference(model, prompts[c.prompt_id], c, 0.3) for c in nucleus],
        "stop": [
            stop,
            list(cool[0].tokens),
            list(stopped.tokens),
            stopped.finish_reason,
            cool[0].finish_reason,
        ],
    }


def _nucleus_difference(
    model: torch.nn.Module, prompt: Prompt, completion: Completion, top_p: float
) -> float:
    """Log-probabilities after top-p, worked out from transformers' logits by the definition."""
    logits = reference_logits(model, prompt, completion)
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    keep = (ordered.cumsum(-1) - ordered) < top_p
    masked = torch.full_like(logits, -torch.inf).scatter(
        -1, order, torch.where(keep, ordered.log(), -torch.inf)
    )
    wanted = masked.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    return float((wanted - torch.tensor(completion.logprobs)).abs().max())


def _bad_first_loads(engine: VllmEngine) -> dict[str, str]:
    return _bad_loads(engine) | {"generate": refusal(lambda: sample(engine, seed=1))}


def _bad_later_loads(engine: VllmEngine) -> dict[str, str]:
    found = _bad_loads(engine)
    found["generate"] = refusal(lambda: sample(engine, seed=1))
    engine.load_weights(hf_tensors(build_toy("moe", seed=1)).items(), policy_version=9)
    found["good at last"] = str(engine.policy_version)
    return found


def _bad_loads(engine: VllmEngine) -> dict[str, str]:
    good = hf_tensors(build_toy("moe", seed=3))
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    missing = {name: tensor for name, tensor in good.items() if name != expert}
    cases: dict[str, Iterable[tuple[str, Tensor]]] = {
        "missing": missing.items(),
        "unknown": {**good, "model.layers.0.mlp.extra.weight": torch.zeros(2)}.items(),
        "no such expert": {**good, "model.layers.0.mlp.experts.8.down_proj.weight": good[expert]}.items(),
        "silently ignored by vLLM": {
            **good,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(128),
        }.items(),
        "doubled": [*good.items(), (expert, good[expert])],
        "misshapen": {**good, expert: good[expert][:, :-1]}.items(),
    }
    return {
        case: refusal(functools.partial(engine.load_weights, named, policy_version=1))
        for case, named in cases.items()
    }


def _refused_requests(engine: VllmEngine) -> dict[str, str]:
    def ask(prompts: list[Prompt]) -> str:
        return refusal(lambda: engine.generate(prompts, SAMPLING, seed=1))

    alien = Prompt(prompt_id=0, tokens=(2, 10_000), text="", answer="")
    empty = Prompt(prompt_id=0, tokens=(), text="", answer="")
    return {
        "too long": ask(toy_prompts(395)), "empty": ask([empty]), "alien": ask([alien]),
        "doubled id": ask(toy_prompts(3) * 2),
    }  # fmt: skip


def _sampling(**changes: Any) -> SamplingSettings:
    values: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "num_samples": 1, "stop_token_ids": (),
    }  # fmt: skip
    return SamplingSettings(**(values | changes))


def refusal(action: Callable[[], object]) -> str:
    """``Type: message`` of the mtrl error that the action raises; "" if it raises none."""
    try:
        action()
    except MtrlError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _stir() -> None:
    torch.manual_seed(12)
    random.seed(13)
    np.random.seed(14)


def _random_states() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}


def _equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    same_numpy = all(np.array_equal(a, b) for a, b in zip(left["numpy"], right["numpy"], strict=True))
    return (
        bool(torch.equal(left["torch"], right["torch"])) and left["python"] == right["python"] and same_numpy
    )


def _plain(completions: list[Completion]) -> list[list[Any]]:
    return [[c.prompt_id, c.sample_index, list(c.tokens), list(c.logprobs)] for c in completions]


def _order(completions: list[Completion]) -> list[list[int]]:
    return [[completion.prompt_id, completion.sample_index] for completion in completions]
