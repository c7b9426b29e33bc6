"""What gpu.py trains, by mtrl and by transformers."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mtrl.batch import Sample
from mtrl.config_engines import OptimizerSection
from mtrl.models.backends import Backend
from mtrl.models.builder import build_model
from mtrl.models.families import load_model_config
from mtrl.models.hf import initialize
from mtrl.models.precision import Fp8
from mtrl.objectives import SftLoss
from mtrl.parallel import groups as parallel_groups
from mtrl.parallel.device import current_device
from mtrl.parallel.groups import ParallelGroups
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from mtrl.policy import make_microbatches
from mtrl.tools.bench.gpu_sizes import Size, Way
from mtrl.trainer import Trainer

LR, CLIP, BETAS, EPS = 1e-4, 1.0, (0.9, 0.95), 1e-8

Step = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A side ready to train: ``step`` is a step on the same batch each time and returns its loss."""

    step: Step
    note: str = ""
    trainer: Trainer | None = None


def alone() -> ParallelGroups:
    """The groups of one process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    parallel_groups.init_distributed(timeout_s=120)
    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec("megatron:d1")))
    parallel_groups.seed_everything(1, groups)
    return groups


def leave() -> None:
    """End what `alone` began: a process that ends with gloo's threads running may abort."""
    if torch.distributed.is_initialized():
        parallel_groups.destroy()
        torch.distributed.destroy_process_group()


def make_batch(size: Size) -> list[Sample]:
    """A step's samples: random tokens, every one but the first trained."""
    generator = torch.Generator().manual_seed(1)
    shape = (size.row_samples * size.num_microbatches, size.sample_tokens)
    rows = torch.randint(size.vocab_size, shape, generator=generator).tolist()
    mask = (False, *[True] * (size.sample_tokens - 1))
    return [Sample(sample_id=n, tokens=tuple(row), loss_mask=mask) for n, row in enumerate(rows)]


def open_mtrl(
    size: Size, way: Way, groups: ParallelGroups, *, like_everywhere: bool, lr: float = LR
) -> Opened:
    """mtrl's trainer. ``like_everywhere``: weights that are the same on every device, drawn on the host."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(size.hf_config()))
        config = load_model_config(Path(folder))
    is_fp8 = way.precision in ("fp8_blockwise", "fp8_delayed")
    model = build_model(
        config,
        groups,
        precision="fp32" if way.precision == "fp32" else "bf16",
        fp8=Fp8(recipe=cast(Any, way.precision)) if is_fp8 else None,
        backend=cast(Backend, way.side),
    )
    if like_everywhere:
        initialize(model, 1)
    else:
        draw(model.parameters().values())
    settings = OptimizerSection(lr=lr, grad_clip=CLIP, beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
    trainer = Trainer(model, settings)
    trainer.start_phase(total_steps=1000, lr=lr, warmup_steps=0)
    batch = make_batch(size)
    microbatches = make_microbatches(batch, model, max_tokens=size.row_tokens, pad_token_id=0)
    assert len(microbatches) == size.num_microbatches
    return Opened(step=lambda: trainer.step(microbatches, SftLoss()).loss, trainer=trainer)


def draw(parameters: Any) -> None:
    """Norms 1, all else normal with deviation 0.02, on the device: billions are slow to draw on a host."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)


def open_transformers(size: Size, way: Way) -> Opened:
    """transformers' model with the arithmetic of a step of mtrl: masters and Adam's moments in fp32.

    Its gradients add up over microbatches in the weights' own dtype.
    """
    import transformers

    device = current_device().torch_device
    config = transformers.Qwen3MoeConfig(**size.hf_config())
    dtype = torch.float32 if way.precision == "fp32" else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).train()
    experts = "eager"
    if hasattr(model, "set_experts_implementation"):  # from 5.0 on
        experts = "grouped_mm"
        model.set_experts_implementation(experts)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    masters = weights if dtype == torch.float32 else [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=device.type == "cuda"
    )
    tokens = torch.tensor([sample.tokens for sample in make_batch(size)], device=device)
    rows = tokens.split(size.row_samples)
    num_trained = tokens.shape[0] * (size.sample_tokens - 1)

    def step() -> float:
        total = torch.zeros((), device=device)
        for row in rows:
            logits: Tensor = model(row, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), row[:, 1:].flatten(), reduction="sum"
            )
            loss = loss / num_trained
            loss.backward()
            total += loss.detach()
        _clip_and_update(weights, masters, optimizer)
        return float(total)

    return Opened(
        step=step, note=f"experts {experts}, attention sdpa, transformers {transformers.__version__}"
    )


def _clip_and_update(weights: list[Tensor], masters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(weights, CLIP)
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight:
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if masters is not weights:
        with torch.no_grad():
            torch._foreach_copy_([weight.data for weight in weights], masters)
