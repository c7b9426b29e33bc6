"""The stages of gpu.py, each a function that runs in a process of its own and yields rows by name."""

import importlib.util
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtrl.models.backends.torch_native import fp8
from mtrl.models.precision import Fp8
from mtrl.parallel.device import current_device
from mtrl.tools.bench.gpu_sizes import QWEN3_30B_A3B, TINY, Size, Way, estimate_bytes
from mtrl.weight_push.copies import Copies

PARITY_STEPS, PARITY_LR = 5, 2e-3
"""Enough for the loss to fall by a quarter, which gives a wrong gradient away."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a stage is given: ``size`` is that of the model of ``steps``; ``tiny``: everything small."""

    size: Size
    ways: Sequence[Way]
    tiny: bool


def synchronise() -> None:
    """Wait for the device."""
    if current_device().kind == "cuda":
        torch.cuda.synchronize()


def timed(
    step: Callable[[], float], *, warm: int, at_least: int, at_most_s: float
) -> tuple[list[float], list[float]]:
    """Seconds and losses of steps after ``warm`` uncounted ones: ``at_least`` so many, then while there is
    time. Losses are those of all steps.
    """
    seconds: list[float] = []
    losses: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < warm + at_least or time.perf_counter() - begin < at_most_s:
        synchronise()
        start = time.perf_counter()
        losses.append(step())
        synchronise()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= warm + 20:
            break
    return seconds[warm:], losses


def peak_bytes() -> int:
    """The most that tensors took on the device; on a CPU, what the process had resident at most."""
    if current_device().kind == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds_of(run: Callable[[], Any], *, rounds: int = 10) -> float:
    """The median of single runs, after two that are not counted."""
    times = []
    for _ in range(rounds + 2):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def tried(run: Callable[[], Row]) -> Row:
    """A row, or the reason why there is none: kernels refuse shapes, dtypes and devices in many ways."""
    try:
        return run()
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError) as error:
        return {"obstacle": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def ceiling(context: Context) -> Iterator[tuple[str, Row]]:
    """What the device reaches at most: products of large squares, and copies within its memory.

    Products are of random numbers: of zeros they are faster, for want of power.
    """
    yield "memory", memory_row()  # before anything is on the device: the model's size follows from it
    device, n, rounds = current_device().torch_device, *((512, 10) if context.tiny else (8192, 100))
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * n**3
    yield (
        "bf16",
        {"size": n, "flops_per_s": flops / seconds_of(lambda: torch.matmul(a, b, out=out), rounds=rounds)},
    )

    def whole_tensor_fp8() -> Row:
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn)
        run = lambda: torch._scaled_mm(  # noqa: E731
            a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return {"size": n, "flops_per_s": flops / seconds_of(run, rounds=rounds)}

    yield "fp8", tried(whole_tensor_fp8)
    num_bytes = 2**24 if context.tiny else 2**33
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source))
    yield "copy", {"bytes": num_bytes, "bytes_per_s": 2 * num_bytes / copy_s}


def memory_row() -> Row:
    """Of the device, in bytes; of the host where there is no GPU."""
    if current_device().kind == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        page = resource.getpagesize()
        free, total = (os.sysconf(f"SC_{name}_PAGES") * page for name in ("AVPHYS", "PHYS"))
    return {"free": free, "total": total}


def parity(context: Context) -> Iterator[tuple[str, Row]]:
    """Losses of the first steps of a toy, from weights and batches that are the same on every device."""
    from mtrl.tools.bench import gpu_model  # Megatron, which other stages do without

    groups = gpu_model.alone()
    for way in context.ways:
        opened = gpu_model.open_mtrl(TINY, way, groups, like_everywhere=True, lr=PARITY_LR)
        losses = [opened.step() for _ in range(PARITY_STEPS)]
        yield str(way), {"losses": losses, "device": str(current_device().torch_device)}
    gpu_model.leave()


def steps(context: Context) -> Iterator[tuple[str, Row]]:
    """Time and memory of training steps."""
    from mtrl.tools.bench import gpu_model

    size, tiny = context.size, context.tiny
    groups = None
    for way in context.ways:
        begin = time.perf_counter()
        if way.side == "transformers":
            opened = gpu_model.open_transformers(size, way)
        else:
            groups = groups or gpu_model.alone()
            opened = gpu_model.open_mtrl(size, way, groups, like_everywhere=False)
        ready_s = time.perf_counter() - begin
        if current_device().kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, losses = timed(
            opened.step, warm=1 if tiny else 2, at_least=2 if tiny else 3, at_most_s=0.0 if tiny else 15.0
        )
        row: Row = {
            "seconds": seconds,
            "losses": losses,
            "peak_bytes": peak_bytes(),
            "ready_s": ready_s,
        }
        if way.side != "transformers":
            fused = any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))
            row["estimated_bytes"] = estimate_bytes(size, way, fused_adam=fused)
        row["tokens_per_s"] = size.step_tokens / statistics.median(seconds)
        row["flops_per_s"] = row["tokens_per_s"] * size.flops_per_token
        about = {"layers": size.num_layers, "experts": size.num_experts, "weights": size.num_weights}
        about |= {"active": size.num_active, "flops_per_token": size.flops_per_token}
        yield str(way), row | about | {"step_tokens": size.step_tokens, "note": opened.note}
    gpu_model.leave()


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """A linear's three products of the same operands: ``x`` [T, K], ``weight`` [O, K], ``dy`` [T, O]."""

    x: Tensor
    weight: Tensor
    dy: Tensor

    def exact(self) -> dict[str, Tensor]:
        """In float64."""
        x, weight, dy = (each.double() for each in (self.x, self.weight, self.dy))
        return {"forward": x @ weight.T, "dgrad": dy @ weight, "wgrad": dy.T @ x}

    def bounds(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """`fp8.product_bound` of each, and bf16's rounding of the result, 2^-8 of it."""
        rows, square = fp8.ALONG_ROWS, fp8.SQUARE
        operands = {
            "forward": ((self.x, rows), (self.weight, square)),
            "dgrad": ((self.dy, rows), (self.weight.T, square)),
            "wgrad": ((self.dy.T, rows), (self.x.T, rows)),
        }
        found = {}
        for name, ((a, blocks_a), (b, blocks_b)) in operands.items():
            errors = fp8.error_bound(a, blocks_a), fp8.error_bound(b, blocks_b)
            bound = fp8.product_bound(a, errors[0], b, errors[1])
            found[name] = bound + 2.0**-8 * (exact[name].abs() + bound)
        return found

    def in_blocks(self, how: Fp8) -> dict[str, Tensor]:
        """Of torch_native."""
        x, weight = (each.detach().clone().requires_grad_() for each in (self.x, self.weight))
        y = fp8.block_linear(x, weight, how)
        dx, dweight = torch.autograd.grad(y, (x, weight), self.dy.to(y.dtype))
        return {"forward": y.detach(), "dgrad": dx, "wgrad": dweight}


FULL_SHAPES = ((8192, 5120, 2048), (8192, 2048, 4096), (512, 1536, 2048), (512, 2048, 768))
TINY_SHAPES = ((128, 256, 384), (256, 128, 128))
"""Tokens, outputs, inputs: projections and experts of Qwen3-30B-A3B."""


def products_of(shape: tuple[int, int, int], *, outliers: bool) -> Products:
    """bf16 operands. ``outliers``: one number in a thousand is 2^10 times as large."""
    tokens, outputs, inputs = shape
    generator = torch.Generator().manual_seed(5)

    def draw(*dims: int, scale: float) -> Tensor:
        found = torch.randn(*dims, generator=generator) * scale
        if outliers:
            found = torch.where(torch.rand(dims, generator=generator) < 1e-3, found * 2.0**10, found)
        return found.to(current_device().torch_device, torch.bfloat16)

    return Products(
        x=draw(tokens, inputs, scale=1.0),
        weight=draw(outputs, inputs, scale=inputs**-0.5),
        dy=draw(tokens, outputs, scale=1e-3),
    )


def fp8_kernels(context: Context) -> Iterator[tuple[str, Row]]:
    """Linears in FP8 blocks against float64 and the format's bound, for our reference, its sums of torch's
    FP8 products over blocks (``model.fp8.products: scaled_mm``), Transformer Engine, and torch's product of
    blocks.
    """
    for shape in TINY_SHAPES if context.tiny else FULL_SHAPES:
        for outliers in (False, True):
            given = products_of(shape, outliers=outliers)
            exact = given.exact()
            bounds = given.bounds(exact)
            reference = given.in_blocks(fp8.REFERENCE)
            for path, opened in PATHS.items():
                name = f"{path} {'x'.join(map(str, shape))}{' outliers' if outliers else ''}"
                yield name, tried(partial(kernel_row, opened, given, exact, bounds, reference))


def kernel_row(
    opened: Callable[[Products], Callable[[], dict[str, Tensor]]],
    given: Products,
    exact: dict[str, Tensor],
    bounds: dict[str, Tensor],
    reference: dict[str, Tensor],
) -> Row:
    """A path's errors by product, and its seconds for all that it computes, quantising included."""
    run = opened(given)
    found = run()
    rows = {what: error_row(found[what], exact[what], bounds[what], reference[what]) for what in found}
    return rows | {"seconds": seconds_of(run, rounds=3)}


def error_row(found: Tensor, exact: Tensor, bound: Tensor, reference: Tensor) -> Row:
    """``of_bound``: the largest error as a share of the bound, which must stay below 1; ``relative``: the
    error's norm over the product's; ``from_reference``: the same of the difference from our reference.
    """
    error = (found.double() - exact).abs()
    is_finite = bool(found.isfinite().all())
    return {
        "of_bound": float((error / bound.clamp_min(1e-300)).max()) if is_finite else math.inf,
        "relative": float(error.norm() / exact.norm()),
        "from_reference": float((found.double() - reference.double()).norm() / exact.norm()),
    }


def transformer_engine_products(given: Products) -> Callable[[], dict[str, Tensor]]:
    """Of Transformer Engine's linear under ``Float8BlockScaling``, e4m3 everywhere, as our reference."""
    te: Any = importlib.import_module("transformer_engine.pytorch")
    recipes: Any = importlib.import_module("transformer_engine.common.recipe")
    recipe = recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3)
    outputs, inputs = given.weight.shape
    linear = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device=given.x.device)
    with torch.no_grad():
        linear.weight.copy_(given.weight)
    x = given.x.detach().clone().requires_grad_()

    def run() -> dict[str, Tensor]:
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            y = linear(x)
        dx, dweight = torch.autograd.grad(y, (x, linear.weight), given.dy)
        return {"forward": y.detach(), "dgrad": dx, "wgrad": dweight}

    return run


def scaled_mm_product(given: Products) -> Callable[[], dict[str, Tensor]]:
    """torch's product of e4m3 blocks, 1 x 128 by 128 x 128, forward alone.

    cuBLAS ("Scaling factors layouts", block scaling of FP8) wants the scales of 1 x 128 with tokens next to
    each other, and those of 128 x 128 with a weight's inputs next to each other, a multiple of 4 of them.
    """
    kinds: Any = F.ScalingType

    def run() -> dict[str, Tensor]:
        x8, x_scales = fp8.quantise(given.x, fp8.ALONG_ROWS)
        w8, w_scales = fp8.quantise(given.weight, fp8.SQUARE)
        y = F.scaled_mm(
            x8, w8.t(),
            x_scales.t().contiguous().t(), kinds.BlockWise1x128,
            F.pad(w_scales, (0, -w_scales.shape[1] % 4)).t(), kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip
        return {"forward": y}

    return run


PATHS: dict[str, Callable[[Products], Callable[[], dict[str, Tensor]]]] = {
    "reference": lambda given: lambda: given.in_blocks(fp8.REFERENCE),
    "block_sums": lambda given: lambda: given.in_blocks(Fp8(products="scaled_mm")),
    "transformer_engine": transformer_engine_products,
    "scaled_mm": scaled_mm_product,
}


def push(context: Context) -> Iterator[tuple[str, Row]]:
    """The copies of a push from trainer's to engine's tensors of one GPU. No engine: tensors of the shapes
    that vLLM has for Qwen3-30B-A3B's layers, and nothing travels.
    """
    size = TINY if context.tiny else QWEN3_30B_A3B
    per_layer = 2 * (size.num_weights - 2 * size.hidden_size * size.vocab_size) // size.num_layers
    num_layers = 2 if context.tiny else math.ceil(10e9 / per_layer)
    for name, is_stacked in (("experts stacked", True), ("experts one by one", False)):
        copies = Copies()
        for _ in range(num_layers):
            layer_copies(size, copies, is_stacked=is_stacked)
        num_bytes = sum(source.nbytes for source in copies.sources)
        start = time.perf_counter()
        fused = copies.coalesced()
        plan_s = time.perf_counter() - start
        fused.run()
        are_equal = all(bool(torch.equal(to, of)) for to, of in copies.pairs)
        yield name, {
            "engine": "no engine", "bytes": num_bytes, "layers": num_layers, "equal": are_equal,
            "copies": len(copies), "fused_copies": len(fused), "plan_s": plan_s,
            "bytes_per_s": 2 * num_bytes / seconds_of(fused.run, rounds=5),
            "unfused_bytes_per_s": 2 * num_bytes / seconds_of(copies.run, rounds=5),
        }  # fmt: skip


def layer_copies(size: Size, copies: Copies, *, is_stacked: bool) -> None:
    """Add those of a layer: Megatron has queries, keys and values by group, the engine all queries first;
    experts are gate, then up on both sides, in one tensor a layer or, with Transformer Engine, one an expert.
    """
    hidden, dim, expert = size.hidden_size, size.head_dim, size.expert_hidden_size

    def new(*shape: int, filled: bool = False) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=current_device().torch_device)
        return made.normal_() if filled else made

    per_group = size.num_heads // size.num_kv_heads * dim
    num_rows = size.num_kv_heads * (per_group + 2 * dim)
    trained, served = new(num_rows, hidden, filled=True), new(num_rows, hidden)
    row = 0
    for width, begin in ((per_group, 0), (dim, per_group), (dim, per_group + dim)):
        for group in range(size.num_kv_heads):
            first = group * (per_group + 2 * dim) + begin
            copies.add(served[row : row + width], trained[first : first + width])
            row += width
    shapes = ((hidden, size.num_heads * dim), (size.num_experts, hidden))
    for shape in shapes:
        copies.add(new(*shape), new(*shape, filled=True))
    for rows, columns in ((2 * expert, hidden), (hidden, expert)):
        target = new(size.num_experts, rows, columns)
        stacked = new(size.num_experts, rows, columns, filled=True) if is_stacked else None
        for number in range(size.num_experts):
            source = new(rows, columns, filled=True) if stacked is None else stacked[number]
            for part in range(2) if rows == 2 * expert else (None,):
                half = slice(None) if part is None else slice(part * expert, (part + 1) * expert)
                copies.add(target[number][half], source[half])


STAGES: dict[str, Callable[[Context], Iterator[tuple[str, Row]]]] = {
    "ceiling": ceiling,
    "parity": parity,
    "steps": steps,
    "fp8": fp8_kernels,
    "push": push,
}
