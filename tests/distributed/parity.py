"""The law of parity: a layout may change speed and memory, never the result.

Three optimizer steps with clipping active are done twice from the same Hugging Face weights and the same
global batches: by transformers' model with torch.optim in one process, and by mtrl under a layout. Compared
are the losses, the gradient norms before clipping, every parameter's first gradient, and the weights after
three steps, mapped back through the weight table.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtrl.models.backends import Backend
from tests.distributed.toy_runs import samples
from tests.distributed.world import World
from tests.family_toys import build_family_toy, published, published_gradients, save

LENGTHS = ((9, 17, 2, 30, 12), (24, 5, 11, 8, 8, 31), (40, 3, 6, 20, 13))
"""Tokens of each sample of each step's global batch."""
MAX_TOKENS = 40
LR, EPS, WEIGHT_DECAY, CLIP = 1e-2, 1e-2, 0.1, 0.5
"""Adam's usual epsilon would make the first updates the sign of the gradient, which rounding can flip."""
BETAS = (0.9, 0.95)

WIDE, DEEP = "qwen3 moe wide", "qwen3 moe wide and deep"
"""A Qwen3-MoE whose sizes every layout of up to 8 ranks divides; the deep one has a layer for each of 8
stages.
"""
_WIDE_FIELDS: dict[str, object] = {
    "num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 8,
    "num_experts": 24, "num_experts_per_tok": 4, "moe_intermediate_size": 48,
}  # fmt: skip

BOUNDS = {"loss": 1e-6, "grad_norm": 1e-6, "gradient": 1e-5, "weights": 1e-4}
"""Largest relative differences of fp32: the first two of a number, the others of a tensor's norm."""
FLOOR_FACTOR = 4
"""A layout may differ by this many times what one process differs by when it adds in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A toy under a layout. ``num_chunks`` > 1 is a virtual pipeline, ``zero`` the distributed optimizer.

    ``max_tokens`` is what a microbatch holds; another number is another order of additions.
    """

    spec: str
    toy: str
    num_chunks: int = 1
    zero: bool = True
    max_tokens: int = MAX_TOKENS
    backend: Backend = "torch_native"

    @property
    def size(self) -> int:
        """Ranks of the layout."""
        from mtrl.parallel.spec import parse_training_spec

        return parse_training_spec(self.spec).world_size

    def __str__(self) -> str:
        parts = [self.spec.removeprefix("megatron:")]
        if self.num_chunks > 1:
            parts.append(f"v{self.num_chunks}")
        if not self.zero:
            parts.append("plain")
        if self.max_tokens != MAX_TOKENS:
            parts.append(f"m{self.max_tokens}")
        if self.backend != "torch_native":
            parts.append(self.backend)
        return f"{' '.join(parts)} {self.toy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Largest relative differences of a pair; ``worst`` names the tensor of the largest gradient error."""

    loss: float
    grad_norm: float
    gradient: float
    weights: float
    worst: str = ""

    def beyond(self, floor: "Errors") -> dict[str, float]:
        """The quantities beyond their bound and beyond `FLOOR_FACTOR` times the floor."""
        found = {name: getattr(self, name) for name in BOUNDS}
        limits = {name: max(bound, FLOOR_FACTOR * getattr(floor, name)) for name, bound in BOUNDS.items()}
        return {name: value for name, value in found.items() if not value <= limits[name]}


def build(toy: str) -> Any:
    """A family toy, or a wide one."""
    if toy in (WIDE, DEEP):
        num_layers = 8 if toy == DEEP else 4
        return build_family_toy("qwen3 moe", seed=6, num_hidden_layers=num_layers, **_WIDE_FIELDS)
    return build_family_toy(toy, seed=5)


def write_reference(folder: Path, toy: str) -> None:
    """Write a toy to ``folder/toy``, and what transformers and torch.optim make of the three steps."""
    model = build(toy)
    save(model, folder / toy)
    before = published(model)
    decayed = [p for p in model.parameters() if p.dim() > 1 and not _is_bias(model, p)]
    spared = [p for p in model.parameters() if p.dim() == 1 or _is_bias(model, p)]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    losses, norms, gradients = [], [], {}
    for step in range(len(LENGTHS)):
        optimizer.zero_grad()
        loss = _mean_nll(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = gradients or published_gradients(model)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(float(loss.detach()))
        optimizer.step()
    assert min(norms) > CLIP, "clipping is not active"
    after = published(model)
    tensors = {f"gradient/{name}": value for name, value in gradients.items()}
    tensors |= {f"weights/{name}": value for name, value in after.items()}
    tensors |= {f"update/{name}": (after[name] - before[name]).norm() for name in after}
    save_file(tensors, folder / toy / "tensors.reference")
    (folder / toy / "numbers.reference").write_text(json.dumps({"loss": losses, "grad_norm": norms}))


def _is_bias(model: Any, parameter: Tensor) -> bool:
    return any(own is parameter and name.endswith("bias") for name, own in model.named_parameters())


def _mean_nll(model: Any, step: int) -> Tensor:
    nll, num_tokens = torch.zeros(()), 0
    for sample in samples(list(LENGTHS[step]), seed=100 + step):
        tokens, mask = torch.tensor(sample.tokens), torch.tensor(sample.loss_mask)
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        nll = nll - logprobs[mask[1:]].sum()
        num_tokens += int(mask.sum())
    return nll / num_tokens


def run_pairs(folder: str, pairs: list[list[Any]]) -> list[dict[str, Any]]:
    """On a rank: what it finds of each pair, in order. Collective over WORLD."""
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.errors import LayoutError
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    found: list[dict[str, Any]] = []
    groups, made_for = None, None
    for spec, toy, num_chunks, zero, max_tokens, backend in pairs:
        pair = Pair(
            spec=spec, toy=toy, num_chunks=num_chunks, zero=zero, max_tokens=max_tokens, backend=backend
        )
        print(f"pair {pair}", flush=True)  # what the story of a failure begins with
        if made_for != (spec, num_chunks):
            if groups is not None:
                parallel_groups.destroy()
            layout = RankLayout.from_spec(parse_training_spec(spec))
            groups, made_for = (
                parallel_groups.create(layout, virtual_pipeline_size=num_chunks),
                (spec, num_chunks),
            )
        parallel_groups.seed_everything(1, groups)
        try:
            found.append(_train(groups, pair, Path(folder) / toy))
        except LayoutError as error:
            found.append({"refused": f"{type(error).__name__}: {error}"})
    return found


def _train(groups: Any, pair: Pair, folder: Path) -> dict[str, Any]:
    from mtrl.config_engines import OptimizerSection
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf
    from mtrl.objectives import SftLoss
    from mtrl.policy import make_microbatches
    from mtrl.trainer import Trainer

    reference = load_file(folder / "tensors.reference")
    config = load_model_config(folder)
    model = build_model(config, groups, num_chunks=pair.num_chunks, backend=pair.backend)
    load_hf(model, folder)
    settings = OptimizerSection(
        lr=LR, eps=EPS, weight_decay=WEIGHT_DECAY, grad_clip=CLIP, beta1=BETAS[0], beta2=BETAS[1],
        distributed=pair.zero,
    )  # fmt: skip

    def microbatches(step: int) -> list[Any]:
        batch = samples(list(LENGTHS[step]), seed=100 + step)
        return make_microbatches(batch, model, max_tokens=pair.max_tokens, pad_token_id=0)

    # The distributed optimizer leaves each rank its share of the gradient only.
    trainer = Trainer(model, settings if not pair.zero else OptimizerSection(lr=LR, distributed=False))
    trainer.start_phase(total_steps=len(LENGTHS), lr=LR, warmup_steps=0)
    trainer.policy.run(microbatches(0), SftLoss(), forward_only=False)
    gradients = {key: parameter.main_grad for key, parameter in model.parameters().items()}
    found: dict[str, Any] = {"gradient": list(_squares(model, gradients, reference, "gradient"))}
    if pair.zero:
        model = build_model(config, groups, num_chunks=pair.num_chunks, backend=pair.backend)
        load_hf(model, folder)
        trainer = Trainer(model, settings)
        trainer.start_phase(total_steps=len(LENGTHS), lr=LR, warmup_steps=0)
    steps = [trainer.step(microbatches(step), SftLoss()) for step in range(len(LENGTHS))]
    found["loss"], found["grad_norm"] = [s.loss for s in steps], [s.grad_norm for s in steps]
    found["weights"] = list(_squares(model, model.tensors(), reference, "weights"))
    return found


def _squares(
    model: Any, own: dict[tuple[int, str], Tensor], reference: dict[str, Tensor], kind: str
) -> Iterator[tuple[str, str, float]]:
    """Of each stored box this rank holds: tensor, box, and the squared norm of the difference."""
    from mtrl.models.pieces import read_stored

    for piece in model.weight_map.of_rank(model.groups.rank).pieces:
        if f"{kind}/{piece.hf.name}" not in reference or (piece.chunk, piece.local.name) not in own:
            continue  # a buffer has no gradient
        for simple in piece.simple():
            full = reference[f"{kind}/{simple.hf.name}"]
            difference = read_stored(own, simple).double() - full[simple.stored.slices].double()
            yield simple.hf.name, str(simple.stored.ranges), float(difference.square().sum())


def errors_of(ranks: Sequence[dict[str, Any]], folder: Path) -> Errors:
    """What all ranks found of a pair, against the reference in ``folder``."""
    numbers = json.loads((folder / "numbers.reference").read_text())
    tensors = load_file(folder / "tensors.reference")

    def number(name: str) -> float:
        pairs = [pair for rank in ranks for pair in zip(rank[name], numbers[name], strict=True)]
        errors = [abs(found - expected) / abs(expected) for found, expected in pairs]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def relative(kind: str, norms: dict[str, float]) -> tuple[float, str]:
        boxes: dict[str, dict[str, float]] = {}
        for rank in ranks:
            for name, box, square in rank[kind]:
                own = boxes.setdefault(name, {})
                own[box] = max(own.get(box, 0.0), square) if not math.isnan(square) else math.nan
        assert set(boxes) == set(norms), f"{kind}: {sorted(set(boxes) ^ set(norms))[:5]}"
        errors = {name: math.sqrt(sum(own.values())) / norms[name] for name, own in boxes.items()}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        return errors[worst], worst

    gradient_norms = _norms(tensors, "gradient/")
    updates = {n.removeprefix("update/"): float(v) for n, v in tensors.items() if n.startswith("update/")}
    moved = {name: norm if norm else 1.0 for name, norm in updates.items()}
    gradient, worst = relative("gradient", gradient_norms)
    weights, _ = relative("weights", moved)
    return Errors(
        loss=number("loss"), grad_norm=number("grad_norm"), gradient=gradient, weights=weights, worst=worst
    )


def _norms(tensors: dict[str, Tensor], prefix: str) -> dict[str, float]:
    # A tensor whose gradient is all zero, an expert nobody chose, is compared absolutely.
    return {
        name.removeprefix(prefix): float(value.double().norm()) or 1.0
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def measure(
    world: World, folder: Path, pairs: Sequence[Pair], *, timeout_s: float = 600.0
) -> list[Errors | str]:
    """The errors of pairs of one world size, in one world; the refusal's text where a pair is refused."""
    (size,) = {pair.size for pair in pairs}
    plain = [[p.spec, p.toy, p.num_chunks, p.zero, p.max_tokens, p.backend] for p in pairs]
    by_rank = world.run(run_pairs, {"folder": str(folder), "pairs": plain}, size=size, timeout_s=timeout_s)
    results: list[Errors | str] = []
    for number, pair in enumerate(pairs):
        ranks = [found[number] for found in by_rank]
        refusals = [rank["refused"] for rank in ranks if "refused" in rank]
        results.append(refusals[0] if refusals else errors_of(ranks, folder / pair.toy))
    return results


class Measured:
    """Errors of ``pairs``; all of one world size are run when the first of them is asked for."""

    def __init__(self, world: World, folder: Path, pairs: Sequence[Pair]) -> None:
        self.world, self.folder, self.pairs = world, folder, tuple(dict.fromkeys(pairs))
        self._found: dict[Pair, Errors | str] = {}

    def __call__(self, pair: Pair) -> Errors:
        if pair not in self._found:
            same_size = [each for each in self.pairs if each.size == pair.size]
            for toy in {each.toy for each in same_size}:
                if not (self.folder / toy).exists():
                    write_reference(self.folder, toy)
            found = measure(self.world, self.folder, same_size)
            self._found.update(zip(same_size, found, strict=True))
        errors = self._found[pair]
        assert isinstance(errors, Errors), errors
        return errors
