"""Routers' losses, selection biases and freezing: a few steps in plain torch, and on a rank."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrl.batch import Sample
from mtrl.config_engines import RouterSection
from mtrl.packing import pack, plan_microbatches
from tests.distributed.toy_runs import MAX_TOKENS, batch, each_case, load_toy
from tests.family_toys import build_family_toy, published, published_gradients, save

LR, EPS, CLIP, BETAS, NUM_STEPS = 1e-2, 1e-2, 0.5, (0.9, 0.95), 2
TOYS = ("qwen3 moe", "glm4 moe")
ROUTERS: dict[str, dict[str, Any]] = {
    "microbatch": {"aux_loss": "microbatch", "aux_loss_coeff": 0.3, "z_loss_coeff": 0.02},
    "sequence": {"aux_loss": "sequence", "aux_loss_coeff": 0.3},
    "global_batch": {"aux_loss": "global_batch", "aux_loss_coeff": 0.3, "z_loss_coeff": 0.02},
    "frozen": {"freeze": True},
}
BIAS_UPDATE_RATE = 0.05
BIAS = "e_score_correction_bias"
Found = dict[str, Any]


def router_section(toy: str, name: str) -> RouterSection:
    """The routers' settings of a run; those of models with a selection bias update it."""
    rate = BIAS_UPDATE_RATE if toy == "glm4 moe" and name != "frozen" else 0.0
    return RouterSection(**ROUTERS[name], bias_update_rate=rate)


def rows_of(samples: list[Sample], num_dp: int) -> list[list[Sample]]:
    """The microbatches of ``num_dp`` data parallel ranks, one rank after another."""
    lengths = [len(sample.tokens) for sample in samples]
    plan = plan_microbatches(lengths, num_dp=num_dp, max_tokens=MAX_TOKENS)
    return [[samples[index] for index in row] for rank in plan for row in rank]


def write_toys(folder: Path) -> None:
    """Write the models, each as ``folder/NAME``."""
    for number, toy in enumerate(TOYS):
        save(build_family_toy(toy, seed=number), folder / toy)


class ByHand:
    """Steps of transformers' model in plain torch: every term of the loss as its definition says it."""

    def __init__(self, toy: str, name: str) -> None:
        self.section, self.model = router_section(toy, name), build_family_toy(toy, seed=TOYS.index(toy))
        config = self.model.config
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_local_experts
        self.is_sigmoid = toy == "glm4 moe"
        self.gates = [m for m in self.model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        for gate in self.gates:
            gate.register_forward_hook(self._note)
            gate.weight.requires_grad_(not self.section.freeze)
        self._logits: dict[int, list[Tensor]] = {}
        self._choices: dict[int, list[Tensor]] = {}

    def _note(self, gate: Any, inputs: Any, output: Any) -> None:
        self._logits.setdefault(id(gate), []).append(output[0])
        self._choices.setdefault(id(gate), []).append(output[2])

    def run(self, num_dp: int) -> Found:
        """Losses, gradient norms, the first gradients and the last weights."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
        found: Found = {"loss": [], "grad_norm": [], "aux_loss": [], "z_loss": []}
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            loss, terms = self._losses(rows_of(batch(step), num_dp))
            (loss + sum(self._weighted(term) for term in terms)).backward()  # type: ignore[no-untyped-call]
            self._logits.clear()
            found.setdefault("gradients", published_gradients(self.model))
            found["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
            found["loss"].append(float(loss.detach()))
            for kind, place in (("aux_loss", 0), ("z_loss", 1)):
                found[kind].append(sum(float(term[place].detach()) for term in terms) / len(terms))
            self._update_bias()
            optimizer.step()
        return {**found, "weights": published(self.model)}

    def _weighted(self, term: tuple[Tensor, Tensor]) -> Tensor:
        return self.section.aux_loss_coeff * term[0] + self.section.z_loss_coeff * term[1]

    def _losses(self, rows: list[list[Sample]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Mean loss of trained tokens; each router's A and Z."""
        self._logits.clear()
        self._choices.clear()
        nll, num_trained = torch.zeros(()), 0
        for sample in (sample for row in rows for sample in row):
            tokens, mask = torch.tensor(sample.tokens), torch.tensor(sample.loss_mask)
            logprobs = (
                self.model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
            )
            nll, num_trained = nll - logprobs[mask[1:]].sum(), num_trained + int(mask.sum())
        per_sample = [len(row) for row in rows]
        terms = []
        for gate in self.gates:
            logits = self._logits[id(gate)]
            groups = {
                "microbatch": [torch.cat(part) for part in _split(logits, per_sample) if part],
                "sequence": logits,
                "global_batch": [torch.cat(logits)],
            }.get(self.section.aux_loss, [])
            num_tokens = sum(len(each) for each in logits)
            a = sum((len(each) * self._imbalance(each) for each in groups), torch.zeros(())) / num_tokens
            terms.append((a, torch.cat(logits).logsumexp(-1).square().mean()))
        return nll / num_trained, terms

    def _imbalance(self, logits: Tensor) -> Tensor:
        scores = logits.sigmoid() if self.is_sigmoid else logits.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        counts = torch.bincount(scores.topk(self.top_k).indices.flatten(), minlength=self.num_experts)
        shares = counts / (len(logits) * self.top_k)
        return self.num_experts * (shares * scores.mean(0)).sum()

    def _update_bias(self) -> None:
        for gate in self.gates if self.section.bias_update_rate else ():
            chosen = torch.cat(self._choices[id(gate)]).flatten()
            counts = torch.bincount(chosen, minlength=self.num_experts).float()
            with torch.no_grad():
                getattr(gate, BIAS).add_(self.section.bias_update_rate * torch.sign(counts.mean() - counts))


def _split(values: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    remaining = iter(values)
    return [[next(remaining) for _ in range(length)] for length in lengths]


def train(folder: str, cases: list[list[Any]], names: list[list[str]]) -> dict[str, Found]:
    """On a rank: for every case and each of its names of ``ROUTERS``, `NUM_STEPS` steps."""
    return {
        f"{case} {name}": train_toy(
            load_toy(groups, num_chunks, Path(folder) / toy), router_section(toy, name)
        )
        for (groups, num_chunks, toy, case), chosen in zip(each_case(cases), names, strict=True)
        for name in chosen
    }


def train_toy(
    model: Any, section: RouterSection, *, num_dp: int | None = None, num_steps: int = NUM_STEPS
) -> Found:
    """A few steps; ``num_dp``: one process, with the microbatches of so many data parallel ranks."""
    from mtrl.objectives import SftLoss

    trainer = open_trainer(model, section)
    found: Found = {"loss": [], "grad_norm": [], "aux_loss": [], "z_loss": []}
    if num_dp is not None:
        found["gradients"] = first_gradients(trainer, microbatches(model, 0, num_dp))
    for step in range(num_steps):
        result = trainer.step(microbatches(model, step, num_dp), SftLoss())
        for name in ("loss", "grad_norm"):
            found[name].append(getattr(result, name))
        for name in ("aux_loss", "z_loss") if result.router else ():
            found[name].append(getattr(result.router, name))
    return {**found, "weights": whole_weights(model)}


def microbatches(model: Any, step: int, num_dp: int | None) -> list[Any]:
    """This rank's microbatches of a step, or all of ``num_dp`` data parallel ranks'."""
    from mtrl.policy import Microbatch, make_microbatches

    if num_dp is None:
        return make_microbatches(batch(step), model, max_tokens=MAX_TOKENS, pad_token_id=0)
    rows = [pack(row, pad_to=48, pad_token_id=0) for row in rows_of(batch(step), num_dp)]
    return [Microbatch.on_device(row) for row in rows]


def open_trainer(model: Any, section: RouterSection) -> Any:
    """A trainer with the optimizer of `ByHand`."""
    from mtrl.config_engines import OptimizerSection
    from mtrl.trainer import Trainer

    settings = OptimizerSection(lr=LR, eps=EPS, grad_clip=CLIP, beta1=BETAS[0], beta2=BETAS[1])
    trainer = Trainer(model, settings, router=section)
    trainer.start_phase(total_steps=NUM_STEPS, lr=LR, warmup_steps=0)
    return trainer


def whole_weights(model: Any) -> dict[str, Tensor]:
    """All weights, on rank 0; nothing on the others. Collective over WORLD."""
    from mtrl.models.gather import TensorGather

    others: list[list[str]] = [[] for _ in range(model.groups.layout.world_size - 1)]
    return dict(TensorGather(model, [list(model.weight_map.hf_shapes()), *others]).run(torch.float32))


def first_gradients(trainer: Any, rows: list[Any]) -> dict[str, Tensor]:
    """In one process: the gradients of a step that is not made, by published name."""
    from mtrl.models.pieces import read_stored
    from mtrl.objectives import SftLoss

    model, biases = trainer.model, trainer.routers.biases()
    trainer.policy.run(rows, SftLoss(), forward_only=False)
    trainer.routers.restore(biases)
    gradients = {key: p.main_grad for key, p in model.parameters().items() if p.requires_grad}
    shapes, found = model.weight_map.hf_shapes(), dict[str, Tensor]()
    for piece in model.weight_map.of_rank(0).pieces:
        if (piece.chunk, piece.local.name) not in gradients:
            continue
        for simple in piece.simple():
            name = simple.hf.name
            whole = found.setdefault(name, torch.zeros(shapes[name]))
            whole[simple.stored.slices] = read_stored(gradients, simple)
    return found
