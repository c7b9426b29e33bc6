"""Stage ``fused`` of gpu.py: log-probabilities and rotary positions by each kernel that mtrl may choose."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mtrl import logprobs
from mtrl.models.backends.torch_native import rotation
from mtrl.parallel.device import current_device
from mtrl.parallel.groups import ParallelGroups
from mtrl.tools.bench.gpu_model import alone, leave
from mtrl.tools.bench.gpu_sizes import QWEN3_30B_A3B, TINY, Size
from mtrl.tools.bench.gpu_stages import Context, Row, seconds_of, synchronise, tried

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

TEMPERATURE = 0.7
Run = Callable[[], Tensor]
Opened = Callable[[Size, ParallelGroups], Run]


def fused(context: Context) -> Iterator[tuple[str, Row]]:
    """A bf16 row of Qwen3-30B-A3B, whole vocabulary, forward and backward, by Megatron's operations, by ours
    in parts, and by what mtrl takes here; of another kernel, what is taken in its place.
    """
    size, groups = TINY if context.tiny else QWEN3_30B_A3B, alone()
    chosen: dict[str, str] = {
        "log-probabilities": logprobs.logprob_kernel(),
        "rotation": rotation.rotation_kernel(),
    }
    for what, kernels in KERNELS.items():
        reference: Tensor | None = None
        for kernel, opened in kernels.items():
            if kernel not in ("megatron", "mtrl.logprobs", chosen[what]):
                yield f"{what} {kernel}", {"obstacle": f"taken here is {chosen[what]}"}
                continue
            row = tried(partial(measured, opened, size, groups, reference))
            reference = row.pop("found", reference)
            yield f"{what} {kernel}", row
    leave()


def measured(
    opened: Opened,
    size: Size,
    groups: ParallelGroups,
    reference: Tensor | None,
) -> Row:
    """Seconds of a run, how far its result is from ``reference``, and, on a GPU, the most bytes that it takes
    beyond what it is given.
    """
    run = opened(size, groups)
    found = run()
    expected = found if reference is None else reference
    row: Row = {"differs_by": float((found - expected).abs().max()), "seconds": seconds_of(run)}
    if current_device().kind == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    return row | {"found": expected}


def chances(kernel: logprobs.Kernel | None, size: Size, groups: ParallelGroups) -> Run:
    """Log-probabilities of a row, by Megatron's kernel where ``kernel`` is None."""
    device = current_device().torch_device
    torch.manual_seed(3)  # the same for every kernel: some overwrite the logits
    logits_TV = torch.randn(size.row_tokens, size.vocab_size, dtype=torch.bfloat16, device=device).mul_(4)
    targets_T = torch.randint(size.vocab_size, (size.row_tokens,), device=device)

    def run() -> Tensor:
        leaf = logits_TV.detach().requires_grad_()
        if kernel is None:
            scaled_TV = (leaf.float() / TEMPERATURE).clone()  # worked on in place
            found: Tensor = -vocab_parallel_cross_entropy(scaled_TV[:, None], targets_T[:, None])[:, 0]
        else:
            found = logprobs.target_logprobs(
                leaf, targets_T, padding=0, temperature=TEMPERATURE, group=groups.attn.tp, kernel=kernel
            )
        torch.autograd.grad(found.sum(), leaf)
        return found.detach()

    return run


def turned(function: Callable[..., Tensor], size: Size, groups: ParallelGroups) -> Run:
    """A layer's queries and keys, turned; the result is the queries', in float32."""
    device = current_device().torch_device
    torch.manual_seed(4)
    rows = [
        torch.randn(size.row_tokens, heads, size.head_dim, dtype=torch.bfloat16, device=device)
        for heads in (size.num_heads, size.num_kv_heads)
    ]
    angles = torch.rand(size.row_tokens, 1, 1, size.head_dim // 2, device=device).repeat(1, 1, 1, 2)
    bounds = torch.tensor([0, size.row_tokens], dtype=torch.int32, device=device)
    config = SimpleNamespace(rotary_interleaved=False, multi_latent_attention=False, apply_rope_fusion=False)

    def run() -> Tensor:
        results: list[Any] = []
        for each in rows:
            leaf = each.detach().requires_grad_()
            found = function(leaf, angles, config=config, cu_seqlens=bounds, cp_group=groups.attn.cp)
            torch.autograd.grad(found, leaf, each)
            results.append(found.detach())
        queries: Tensor = results[0].float()
        return queries

    return run


KERNELS: dict[str, dict[str, Opened]] = {
    "log-probabilities": {
        "megatron": partial(chances, None),
        "mtrl.logprobs": partial(chances, "mtrl.logprobs"),
        "fla.modules.fused_cross_entropy": partial(chances, "fla.modules.fused_cross_entropy"),
    },
    "rotation": {
        "megatron": partial(turned, rotation._megatrons),
        "torch.compile": partial(turned, rotation.apply),
    },
}
"""The first of each is what the others are compared with."""
