"""Toy models on every layout: which layouts, and what each rank does to open one.

The reference is always transformers, or one process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mtrl.batch import Sample
from tests.distributed.world import World
from tests.toys import SMALL, build_toy, write_weights

# Each toy: its kind, tied embeddings, and config fields that differ from SMALL.
TOYS: dict[str, tuple[Any, bool, dict[str, object]]] = {
    "dense": ("dense", False, {}),
    "dense tied": ("dense", True, {}),
    "moe": ("moe", False, {}),
    "moe tied": ("moe", True, {}),
    "moe 3 layers": ("moe", False, {"num_hidden_layers": 3}),
    "moe 3 layers tied": ("moe", True, {"num_hidden_layers": 3}),
    # One dense layer among mixtures, and probabilities of the chosen experts as they are.
    "mixed": ("moe", False, {"mlp_only_layers": [1], "norm_topk_prob": False}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A toy under a layout; ``num_chunks`` > 1 is a virtual pipeline."""

    spec: str
    size: int
    toy: str
    num_chunks: int = 1

    def __str__(self) -> str:
        virtual = f" v{self.num_chunks}" if self.num_chunks > 1 else ""
        return f"{self.spec.removeprefix('megatron:')}{virtual} {self.toy}"


def _cases() -> Iterator[Case]:
    for toy in TOYS:
        yield Case(spec="megatron:d1", size=1, toy=toy)
    for spec, size, toys in (
        ("megatron:d2", 2, ["dense"]),
        ("megatron:t2", 2, ["dense", "dense tied", "moe", "mixed"]),
        ("megatron:p2", 2, ["dense tied", "moe", "moe 3 layers", "moe 3 layers tied", "mixed"]),
        ("megatron:(attn:d2|ffn:e2)", 2, ["moe", "mixed"]),
        ("megatron:(attn:t2|ffn:e2)", 2, ["moe", "moe tied"]),
        ("megatron:(attn:d2|ffn:t2)", 2, ["moe"]),
        ("megatron:(attn:t2|ffn:t2)", 2, ["moe"]),
        ("megatron:d2t2", 4, ["dense tied", "moe"]),
        ("megatron:t4", 4, ["moe"]),
        ("megatron:p4", 4, ["moe tied"]),
        ("megatron:(attn:d2t2|ffn:e4)", 4, ["moe"]),
        ("megatron:(attn:d4|ffn:t2e2)", 4, ["moe"]),
        ("megatron:(attn:d2t2|ffn:t2e2)", 4, ["moe tied"]),
        ("megatron:(attn:t4|ffn:e4)", 4, ["mixed"]),
        ("megatron:(attn:p2t2|ffn:e2)", 4, ["moe 3 layers", "mixed"]),
        ("megatron:(attn:p2t2|ffn:t2)", 4, ["moe 3 layers tied"]),
        ("megatron:(attn:d2p2t2|ffn:t2e2)", 8, ["moe"]),
        ("megatron:(attn:d2p2t2|ffn:e4)", 8, ["moe 3 layers tied"]),
        ("megatron:(attn:d2t4|ffn:e8)", 8, ["moe tied"]),
        ("megatron:(attn:d2t4|ffn:t4e2)", 8, ["moe"]),
        ("megatron:p4t2", 8, ["mixed"]),
    ):
        for toy in toys:
            yield Case(spec=spec, size=size, toy=toy)
    yield Case(spec="megatron:p2", size=2, toy="dense", num_chunks=2)
    yield Case(spec="megatron:p2", size=2, toy="moe tied", num_chunks=2)
    yield Case(spec="megatron:(attn:p2t2|ffn:e2)", size=4, toy="moe", num_chunks=2)


CASES = tuple(_cases())

BATCHES = [[9, 17, 2, 30, 12], [24, 5, 11, 8, 8, 31], [40, 3, 6, 20, 13]]
MAX_TOKENS = 40


def write_toys(folder: Path) -> dict[str, torch.nn.Module]:
    """Write every toy as ``folder/NAME`` with its weights; return transformers' models."""
    models = {}
    for number, (name, (kind, tied, fields)) in enumerate(TOYS.items()):
        models[name] = build_toy(kind, seed=number, tied=tied, **(SMALL | fields))
        write_weights(models[name], folder / name)
    return models


def samples(lengths: list[int], *, seed: int) -> list[Sample]:
    """Random samples; about half the tokens of each are trained."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = int(str(SMALL["vocab_size"]))
    found = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.5).tolist()
        found.append(Sample(sample_id=number, tokens=tuple(tokens), loss_mask=(False, *mask[1:])))
    return found


def each_case(cases: list[list[Any]]) -> Iterator[tuple[Any, int, str, str]]:
    """On a rank: (groups, number of chunks, toy, name of the case) for each case. Collective over WORLD.

    Cases of one layout share its groups, whose connections cost more than everything else.
    """
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    for (spec, num_chunks), members in groupby(cases, key=lambda case: (case[0], case[1])):
        layout = RankLayout.from_spec(parse_training_spec(spec))
        groups = parallel_groups.create(layout, virtual_pipeline_size=num_chunks)
        parallel_groups.seed_everything(1, groups)
        for _, _, toy, name in members:
            print(f"case {name}", flush=True)  # what the story of a failure begins with
            yield groups, num_chunks, toy, name
        parallel_groups.destroy()


def load_toy(groups: Any, num_chunks: int, path: Path, **options: Any) -> Any:
    """On a rank: the model of folder ``path`` with its weights; ``options`` are those of ``build_model``."""
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf

    model = build_model(load_model_config(path), groups, num_chunks=num_chunks, **options)
    load_hf(model, path)
    return model


def batch(step: int) -> list[Sample]:
    return samples(BATCHES[step], seed=100 + step)


def open_trainer(model: Any, *, distributed: bool, lr: float = 1e-2) -> Any:
    """A trainer whose first updates are smooth in the gradient; Adam's usual epsilon makes them its sign."""
    from mtrl.config_engines import OptimizerSection
    from mtrl.trainer import Trainer

    trainer = Trainer(model, OptimizerSection(lr=lr, eps=1e-2, grad_clip=0.5, distributed=distributed))
    trainer.start_phase(total_steps=len(BATCHES), lr=lr, warmup_steps=0)
    return trainer


def microbatches(model: Any, samples: list[Sample]) -> list[Any]:
    from mtrl.policy import make_microbatches

    return make_microbatches(samples, model, max_tokens=MAX_TOKENS, pad_token_id=0)


class Runs:
    """Runs a function for all cases of a world size in one world, the first time one of them is asked for.

    The function takes the toys' folder and the cases, and returns a dict by ``str(case)``.
    """

    def __init__(
        self, world: World, function: Callable[..., object], folder: Path, cases: tuple[Case, ...]
    ) -> None:
        self.world, self.function, self.folder, self.cases = world, function, folder, cases
        self._results: dict[int, list[Any]] = {}

    def __call__(self, case: Case) -> list[Any]:
        """What each rank found of this case, in rank order."""
        if case.size not in self._results:
            chosen = [[c.spec, c.num_chunks, c.toy, str(c)] for c in self.cases if c.size == case.size]
            arguments = {"folder": str(self.folder), "cases": chosen}
            self._results[case.size] = self.world.run(
                self.function, arguments, size=case.size, timeout_s=240.0
            )
        return [rank[str(case)] for rank in self._results[case.size]]
