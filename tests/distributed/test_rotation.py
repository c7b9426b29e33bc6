"""Queries and keys turned by our one function, plain and compiled, against Megatron's operations."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed import distributed_c10d

from mtrl.models.config import RopeConfig
from mtrl.models.packed import PackedSegments
from tests.distributed.toy_runs import each_case
from tests.distributed.world import World
from tests.family_toys import build_family_toy, save

LENGTHS = [9, 17, 1, 5]
KINDS = {
    "whole head": (16, 1.0, False),
    "half a head": (8, 1.0, False),
    "scaled": (16, 1.1386, False),
    "latent attention": (16, 1.0, True),
    "latent attention, scaled": (16, 0.9, True),
}
"""Dims of 16 that are turned, the scale of YaRN, whether pairs lie together."""


def drawn(precision: str, lengths: list[int], num_heads: int) -> tuple[Tensor, Tensor]:
    """This rank's rows, as a view with gaps as Megatron's keys are, and the gradient of what they become.

    "exact" are those of "bf16", in float32.
    """
    torch.manual_seed(7)
    num_tokens = sum(lengths) // dist.get_world_size()
    mixed, grad = torch.randn(num_tokens, num_heads, 40), torch.randn(num_tokens, num_heads, 16)
    if precision != "fp32":
        mixed, grad = mixed.bfloat16(), grad.bfloat16()
    if precision == "exact":
        mixed, grad = mixed.float(), grad.float()
    return mixed[..., 8:24].requires_grad_(), grad


def turned(function: Any, kind: str, precision: str, lengths: list[int], num_heads: int) -> list[Tensor]:
    """What becomes of the rows, and their gradient."""
    from mtrl.models.backends.torch_native.rotary import PackedRotary

    size, scale, is_paired = KINDS[kind]
    group = distributed_c10d._get_default_group()
    cp, rank = group.size(), group.rank()
    segments = PackedSegments.from_lengths(lengths, torch.device("cpu"), cp=cp, cp_rank=rank)
    rotary = PackedRotary(
        RopeConfig(theta=100.0, fraction=1.0, kind="default"), size, cp_group=group, on_cpu=True
    )
    rows, grad = drawn(precision, lengths, num_heads)
    config = SimpleNamespace(
        rotary_interleaved=False, multi_latent_attention=is_paired, apply_rope_fusion=False
    )
    from mtrl.parallel.megatron_ready import MEGATRON_0_19

    more = {"mla_rotary_interleaved": is_paired} if MEGATRON_0_19 else {}
    result = function(
        rows, rotary(segments), config=config, cu_seqlens=segments.cu_seqlens_q, mscale=scale, cp_group=group,
        **more,
    )  # fmt: skip
    (found,) = torch.autograd.grad(result, rows, grad)
    return [result.detach(), found]


def differ_from_megatron() -> dict[str, bool]:
    from mtrl.models.backends.torch_native import rotation

    rotation._compiled = lambda: rotation.rotate  # type: ignore[assignment]
    found = {}
    for kind, precision, num_heads in itertools.product(KINDS, ("fp32", "bf16"), (3, 1)):
        ours = turned(rotation.apply, kind, precision, LENGTHS, num_heads)
        theirs = turned(rotation._megatrons, kind, precision, LENGTHS, num_heads)
        found[f"{kind} {precision} {num_heads}"] = not all(map(torch.equal, ours, theirs))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_the_function_gives_megatrons_numbers_to_the_bit(world: World, size: int) -> None:
    for of_rank in world.run(differ_from_megatron, size=size):
        assert len(of_rank) == 20
        assert not [name for name, differs in of_rank.items() if differs]


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def compiled_errors() -> dict[str, Any]:
    """By kind: the largest difference from Megatron's in float32; in bf16 the largest error, as a share of
    that of Megatron's. And how often something was compiled for rows of six other lengths.
    """
    from mtrl.models.backends.torch_native import rotation

    found: dict[str, Any] = {}
    for kind in ("half a head", "latent attention, scaled"):
        ours, theirs, rounded, theirs_rounded, exact = (
            turned(function, kind, precision, LENGTHS, 3)
            for function, precision in (
                (rotation.apply, "fp32"),
                (rotation._megatrons, "fp32"),
                (rotation.apply, "bf16"),
                (rotation._megatrons, "bf16"),
                (rotation._megatrons, "exact"),
            )
        )
        found[kind] = [largest(ours, theirs), largest(rounded, exact) / largest(theirs_rounded, exact)]
    before = counters["stats"]["unique_graphs"]
    for length in (16, 24, 48, 40, 8, 56):
        turned(rotation.apply, "half a head", "fp32", [length], 3)
    return found | {"compiled": counters["stats"]["unique_graphs"] - before}


@pytest.mark.one_stack
def test_compiled_it_rounds_alike_and_rows_of_all_lengths_share_it(world: World) -> None:
    (found,) = world.run(compiled_errors, size=1, timeout_s=280.0)
    assert found.pop("compiled") == 0
    for difference, of_megatrons_error in found.values():
        assert difference < 1e-6  # the compiler may round a product and a sum once, not twice
        assert 0.0 < of_megatrons_error <= 1.0  # the same in bf16


def reads_back(name: str) -> bool:
    """Whether rows on torch's meta device, which has no numbers, are too little for it to go on."""
    from mtrl.models.backends.torch_native import rotation

    rotation._compiled = lambda: rotation.rotate  # type: ignore[assignment]
    config = SimpleNamespace(rotary_interleaved=False, multi_latent_attention=False, apply_rope_fusion=False)
    rows = torch.empty(32, 2, 16, device="meta")
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    angles = torch.empty(32, 1, 1, 16, device="meta")
    try:
        getattr(rotation, name)(
            rows, angles, config=config, cu_seqlens=bounds, cp_group=distributed_c10d._get_default_group()
        )
    except (RuntimeError, NotImplementedError):
        return True
    return False


def test_megatrons_reads_lengths_back_from_the_device_and_ours_does_not(world: World) -> None:
    assert world.run(reads_back, {"name": "_megatrons"}, size=1) == [True]
    assert world.run(reads_back, {"name": "apply"}, size=1) == [False]


def gradients_of(folder: str, toys: list[str], recompute: str, is_compiled: bool) -> dict[str, list[Any]]:
    """By toy: how many calls of ours a pass with backward made, and the largest difference of logits and
    gradients from Megatron's, over the largest of each.
    """
    from mtrl.models.backends.torch_native import rotation
    from mtrl.models.builder import build_model
    from mtrl.models.families import load_model_config
    from mtrl.models.hf import load_hf
    from mtrl.models.megatron_config import recompute_fields

    segments = PackedSegments.from_lengths(LENGTHS, torch.device("cpu"))
    assert segments.positions_T is not None
    calls: list[torch.Size] = []
    function = rotation._compiled() if is_compiled else rotation.rotate

    def counted(rows: Tensor, *arguments: Any, **named: Any) -> Tensor:
        calls.append(rows.shape)
        return function(rows, *arguments, **named)

    rotation._compiled = lambda: counted  # type: ignore[assignment]
    found: dict[str, list[Any]] = {}
    for groups, _, toy, name in each_case([["megatron:d1", 1, toy, toy] for toy in toys]):
        path = Path(folder) / toy
        results = []
        for kernel in ("megatron", "torch.compile"):
            calls.clear()
            model = build_model(load_model_config(path), groups, **recompute_fields(recompute, ()))  # type: ignore[arg-type]
            load_hf(model, path)
            rotation.install(kernel)
            chunk = model.chunks[0].train()
            tokens = torch.arange(sum(LENGTHS))[None] % 97
            logits = chunk(tokens, segments.positions_T[None], None, packed_seq_params=segments)
            logits.square().sum().backward()
            results.append(
                [logits.detach(), *(each.grad for each in chunk.parameters() if each.grad is not None)]
            )
        pairs = zip(*results, strict=True)
        found[name] = [len(calls), max(float((b - a).abs().max() / a.abs().max()) for a, b in pairs)]
    return found


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    for toy in TOYS:
        save(build_family_toy(toy, seed=3), folder / toy)
    return folder


TOYS = ["qwen3 moe", "glm4 moe", "gpt oss", "deepseek v3"]
"""Whole heads, half of them, YaRN, and latent attention; of four layers each."""


def test_attention_of_every_kind_calls_it_for_queries_and_keys(world: World, toys: Path) -> None:
    arguments = {"folder": str(toys), "toys": TOYS, "recompute": "none", "is_compiled": False}
    (found,) = world.run(gradients_of, arguments, size=1)
    assert found == {toy: [8, 0.0] for toy in TOYS}


@pytest.mark.one_stack
def test_layers_that_are_recomputed_call_the_compiled_one_again(world: World, toys: Path) -> None:
    arguments = {"folder": str(toys), "toys": ["deepseek v3"], "recompute": "full", "is_compiled": True}
    ((calls, difference),) = world.run(gradients_of, arguments, size=1, timeout_s=280.0)[0].values()
    assert calls == 16
    assert difference < 1e-5  # float32 through four layers; the largest seen is 1e-6
