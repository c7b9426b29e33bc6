"""Log-probabilities over a split vocabulary: against Megatron's cross-entropy to the bit, float64, and the
kernel of fla-core, which Triton's interpreter runs on a CPU.
"""

import importlib.util
import itertools
import math
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

import mtrl.logprobs
from mtrl.logprobs import Kernel, target_logprobs
from tests.distributed.toy_runs import batch, each_case, load_toy, microbatches, open_trainer, write_toys
from tests.distributed.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
NUM_TOKENS, SHARE = 13, 300
needs_fla = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fla", "triton")),
    reason="needs fla-core and triton, which no CPU environment installs: see docs/acceleration.md",
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[World]:
    """Ranks whose Triton interprets kernels: it decides so when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        world = World()
        world.run(rank_of_world, size=1)  # starts the process that others are forked from
    yield world
    world.close()


def rank_of_world() -> int:
    return dist.get_rank()


def drawn(precision: str, size: int, padding: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same on all ranks: logits of the whole vocabulary, of which the last columns are padding, targets,
    and the gradient of their log-probabilities, 0 for some.
    """
    torch.manual_seed(5)
    logits_TV = (torch.randn(NUM_TOKENS, size * SHARE) * 4).to(DTYPES[precision])
    targets_T = torch.randint(0, size * SHARE - padding, (NUM_TOKENS,))
    grad_T = torch.where(torch.arange(NUM_TOKENS) % 4 == 0, 0.0, torch.randn(NUM_TOKENS))
    return logits_TV, targets_T, grad_T.to(torch.promote_types(logits_TV.dtype, torch.float32))


def own_padding(padding: int) -> int:
    """How many of this rank's columns are among the last ``padding`` of the vocabulary."""
    return min(SHARE, max(0, padding - (dist.get_world_size() - 1 - dist.get_rank()) * SHARE))


def computed(
    precision: str, padding: int, temperature: float, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the gradient of this rank's logits."""
    logits_TV, targets_T, grad_T = drawn(precision, dist.get_world_size(), padding)
    own_TV = logits_TV.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous().requires_grad_()
    logprobs_T = target_logprobs(
        own_TV, targets_T, padding=own_padding(padding), temperature=temperature,
        group=distributed_c10d._get_default_group(), kernel=kernel,
    )  # fmt: skip
    # The kernel writes a gradient over the logits, which autograd would refuse to keep for a leaf.
    (grad_TV,) = torch.autograd.grad(logprobs_T, own_TV, grad_T)
    return logprobs_T.detach(), grad_TV


def exactly(precision: str, padding: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the whole vocabulary by torch's log_softmax in float64, the gradient this rank's share."""
    logits_TV, targets_T, grad_T = drawn(precision, dist.get_world_size(), padding)
    whole_TV = logits_TV.double().requires_grad_()
    real_TV = whole_TV[:, : whole_TV.shape[1] - padding]
    logprobs_T = (real_TV / temperature).log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    (grad_TV,) = torch.autograd.grad(logprobs_T, whole_TV, grad_T.double())
    return logprobs_T.detach(), grad_TV.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]


def by_megatron(precision: str, padding: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By Megatron's kernel, which wants float32 logits that it may overwrite."""
    import mtrl.parallel.megatron_ready  # noqa: F401

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    logits_TV, targets_T, grad_T = drawn(precision, dist.get_world_size(), padding)
    own_TV = logits_TV.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous().requires_grad_()
    scaled_TV = own_TV.float() / temperature if temperature != 1.0 else own_TV.float()
    is_padding_V = torch.arange(SHARE) >= SHARE - own_padding(padding)
    scaled_TV = scaled_TV.masked_fill(is_padding_V, torch.finfo(torch.float32).min)
    nll_T1 = vocab_parallel_cross_entropy(scaled_TV.clone()[:, None], targets_T[:, None])
    logprobs_T = -nll_T1[:, 0]
    (grad_TV,) = torch.autograd.grad(logprobs_T, own_TV, grad_T)
    return logprobs_T.detach(), grad_TV


# Padding of more than a share leaves the last rank without a token.
SETTINGS: list[list[Any]] = [
    list(each) for each in itertools.product(("fp32", "bf16"), (0, 7, SHARE + 7), (1.0, 0.7))
]


def differ_from_megatron(settings: list[list[Any]]) -> dict[str, bool]:
    found = {}
    for (precision, padding, temperature), rows_bytes in itertools.product(settings, (2**26, 2 * SHARE * 4)):
        if padding >= SHARE * dist.get_world_size():
            continue
        mtrl.logprobs.ROWS_BYTES["cpu"] = rows_bytes
        ours = computed(precision, padding, temperature, "mtrl.logprobs")
        theirs = by_megatron(precision, padding, temperature)
        name = f"{precision} {padding} {temperature} {rows_bytes}"
        found[name] = not all(map(torch.equal, ours, theirs))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_rows_in_parts_give_megatrons_numbers_to_the_bit(world: World, size: int) -> None:
    for of_rank in world.run(differ_from_megatron, {"settings": SETTINGS}, size=size):
        assert len(of_rank) == (16 if size == 1 else 24)
        assert not [name for name, differs in of_rank.items() if differs]


def errors(settings: list[list[Any]], kernel: Kernel) -> dict[str, list[float]]:
    """By setting, against float64: the largest error of log-probabilities over the largest of them, of the
    gradients over the largest that is passed back, and what gradient padding has.
    """
    found = {}
    for precision, padding, temperature in settings:
        logprobs_T, grad_TV = computed(precision, padding, temperature, kernel)
        exact_T, exact_TV = exactly(precision, padding, temperature)
        pads_TP = grad_TV[:, SHARE - own_padding(padding) :]
        upstream = drawn(precision, dist.get_world_size(), padding)[2].abs().max()
        # bf16 rounds each number of a gradient once, by 2^-8 of it at most; Triton's interpreter cuts digits
        # off instead (triton/runtime/interpreter.py, cast_impl), which is 2^-7.
        unit = 2.0**-8 if kernel == "mtrl.logprobs" else 2.0**-7
        rounding_TV = exact_TV.abs() * (unit if precision == "bf16" else 0.0)
        found[f"{precision} {padding} {temperature}"] = [
            float((logprobs_T - exact_T).abs().max() / exact_T.abs().max()),
            float(((grad_TV - exact_TV).abs() - rounding_TV).max() / upstream),
            float(pads_TP.abs().sum()),
        ]
        assert logprobs_T.dtype == torch.promote_types(DTYPES[precision], torch.float32)
        assert grad_TV.dtype == DTYPES[precision]
    return found


def test_a_float64_model_keeps_its_digits(world: World) -> None:
    settings = [["fp64", padding, temperature] for padding in (0, 7) for temperature in (1.0, 0.7)]
    for of_rank in world.run(errors, {"settings": settings, "kernel": "mtrl.logprobs"}, size=2):
        assert all(number < 1e-14 for numbers in of_rank.values() for number in numbers)


def test_rows_in_parts_round_a_bf16_gradient_once(world: World) -> None:
    settings = [["bf16", 7, temperature] for temperature in (1.0, 0.7)]
    for of_rank in world.run(errors, {"settings": settings, "kernel": "mtrl.logprobs"}, size=2):
        assert all(number < 1e-6 for numbers in of_rank.values() for number in numbers)


def flatten_gathers() -> None:
    gather = dist.all_gather_into_tensor

    def gather_rows(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any) -> None:
        # The kernel gathers [T] to [ranks, T]: NCCL has that, gloo wants [ranks * T].
        gather(output_tensor.view(-1), input_tensor, group=group)

    vars(dist)["all_gather_into_tensor"] = gather_rows


def errors_of_fla(settings: list[list[Any]]) -> dict[str, list[float]]:
    flatten_gathers()
    return errors(settings, "fla.modules.fused_cross_entropy")


@needs_fla
@pytest.mark.one_stack
@pytest.mark.parametrize("size", [1, 2])
def test_flas_kernel_gives_float64s_values_and_gradients(interpreted: World, size: int) -> None:
    settings = [each for each in SETTINGS if each[1] < SHARE * size]
    for of_rank in interpreted.run(errors_of_fla, {"settings": settings}, size=size):
        assert len(of_rank) == len(settings)
        # float32 holds a logit of 20 to 1e-6, and so its probability.
        assert not {name: each for name, each in of_rank.items() if not all(x < 2e-6 for x in each)}


def losses_of_steps(folder: str, kernel: Kernel) -> list[float]:
    """Of four steps on one batch, through the schedule and the optimizer of a real trainer."""
    from mtrl.objectives import SftLoss

    flatten_gathers()
    vars(mtrl.logprobs)["logprob_kernel"] = lambda: kernel
    losses: list[float] = []
    for groups, chunks, toy, _ in each_case([["megatron:t2", 1, "dense tied", "t2"]]):
        model = load_toy(groups, chunks, Path(folder) / toy)
        trainer = open_trainer(model, distributed=False)
        rows = microbatches(model, batch(0))
        losses = [trainer.step(rows, SftLoss()).loss for _ in range(4)]
    return losses


@needs_fla
@pytest.mark.one_stack
def test_a_trainer_learns_the_same_by_flas_kernel(interpreted: World, tmp_path: Path) -> None:
    write_toys(tmp_path)
    kernels = get_args(Kernel)
    found = [
        interpreted.run(losses_of_steps, {"folder": str(tmp_path), "kernel": kernel}, size=2)[0]
        for kernel in kernels
    ]
    assert found[0][-1] < found[0][0] - 0.01
    assert found[0] != found[1]  # they are two ways
    # float32, through three updates; the largest seen is 6e-8.
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Sizes(TorchDispatchMode):
    """Notes the bytes of every tensor that operations give, those of gradients included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype != torch.bfloat16:
            self.found.append(result.numel() * result.element_size())
        return result


def largest_copy() -> int:
    mtrl.logprobs.ROWS_BYTES["cpu"] = 4 * SHARE * 4
    with Sizes() as sizes:
        computed("bf16", 7, 0.7, "mtrl.logprobs")
    drawing = Sizes()
    with drawing:
        drawn("bf16", 1, 7)
    own: list[int] = sizes.found[len(drawing.found) :]
    return max(own)


def test_no_copy_of_all_logits_is_made_in_float32(world: World) -> None:
    (largest,) = world.run(largest_copy, size=1)
    assert largest <= math.ceil(NUM_TOKENS / 3) * SHARE * 4 < NUM_TOKENS * SHARE * 4 / 2


def test_the_kernel_is_taken_on_a_gpu_alone_and_in_tested_versions_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = mtrl.logprobs.logprob_kernel.__wrapped__  # uncached
    found = {}
    for is_gpu, installed in itertools.product((True, False), ("0.6.0", "0.6.3", "0.5.1", "0.7.0", None)):
        monkeypatch.setattr(mtrl.logprobs, "can_build_kernels", lambda answer=is_gpu: answer)
        monkeypatch.setattr(mtrl.logprobs, "version", partial(reported, installed))
        found[is_gpu, installed] = choose()
    taken = {(True, "0.6.0"), (True, "0.6.3")}
    assert {each for each, kernel in found.items() if kernel != "mtrl.logprobs"} == taken


def reported(installed: str | None, name: str) -> str:
    if installed is None:
        raise PackageNotFoundError(name)
    return installed
