"""Proofs of a conversion: what was written, read anew, is what was to be written."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from filecmp import cmp
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from mtrl.checkpoint.convert import NUM_WRITERS, forget, read_parts
from mtrl.checkpoint.convert_plan import FormatName, Plan, num_bytes, open_source
from mtrl.models.boxes import Box
from mtrl.models.sources import TensorSource, TypedSource
from mtrl.parallel.errors import CheckpointError, ModelError, WeightError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec

Level = Literal["names", "full", "logits"]

MAX_LOGIT_DIFFERENCE = 1e-4
NUM_TOKENS = 48


def prove(plan: Plan, *, level: Level, report: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """Check what stands in ``plan.request.partial``; a line for each thing that holds.

    ``names`` are key set, shapes, dtypes and bytes; ``full`` every bit too; ``logits`` the model's output
    besides. ``report`` is told bytes as they are compared.

    Raises:
        CheckpointError: what does not hold. The same conversion then begins anew.
    """
    try:
        yield check_written(plan, every_bit=level != "names", report=report)
        if level == "logits":
            yield check_logits(plan)
    except (CheckpointError, ModelError, WeightError) as error:
        forget(plan)
        raise CheckpointError(f"{plan.request.partial} is not what it should be: {error}") from error


def check_written(plan: Plan, *, every_bit: bool, report: Callable[[int], None] = lambda _: None) -> str:
    """Check keys, shapes, dtypes and bytes of what was written, and every bit if asked; a line.

    Raises:
        CheckpointError: what differs, the first ten of it.
        ModelError, WeightError: it cannot be read.
    """
    request = plan.request
    with open_source(request.partial, _format(plan), plan.config, plan.kinds) as written:
        wrong = _headers(plan, written)
        if every_bit and not wrong:
            with open_source(request.source, plan.source_format, plan.config) as source:
                wrong = _different(plan, source, written, report)
            copies = plan.copies.items()
            wrong += [
                f"{n}: differs" for n, path in copies if not cmp(path, request.partial / n, shallow=False)
            ]
    if wrong:
        raise CheckpointError("; ".join(wrong[:10]))
    what = (
        "every bit of them compared with the source's" if every_bit else "names, shapes and dtypes compared"
    )
    return f"{len(plan.kinds)} tensors, {plan.num_bytes:,} bytes; {what}"


def _different(
    plan: Plan, source: TypedSource, written: TypedSource, report: Callable[[int], None]
) -> list[str]:
    """What is wrong with the elements of each tensor, all of which both sources have."""

    def compare(name: str) -> str | None:
        same = _same(plan, name, source, written)
        report(num_bytes(plan.kinds[name]))
        return None if same else f"{name}: elements differ"

    # Stored chunks of Megatron's are kept for the next tensor: one reader, in order.
    is_plain = "torch_dist" not in (plan.source_format, plan.request.to)
    with ThreadPoolExecutor(NUM_WRITERS if is_plain else 1) as pool:
        return [wrong for wrong in pool.map(compare, plan.kinds) if wrong]


def _format(plan: Plan) -> FormatName:
    return "torch_dist" if plan.request.to == "torch_dist" else "hf"  # a checkpoint has no manifest yet


def _headers(plan: Plan, written: TypedSource) -> list[str]:
    shapes, dtypes = written.shapes(), written.dtypes()
    wrong = [f"{name} is missing" for name in plan.kinds if name not in shapes]
    wrong += [f"{name} was not asked for" for name in shapes if name not in plan.kinds]
    wrong += [
        f"{name} is {dtypes.get(name)} of {shapes[name]}, not {dtype} of {shape}"
        for name, (dtype, shape) in plan.kinds.items()
        if name in shapes and (dtypes.get(name), shapes[name]) != (dtype, shape)
    ]
    return wrong


def _same(plan: Plan, name: str, source: TypedSource, written: TypedSource) -> bool:
    dtype, shape = plan.kinds[name]
    pairs = zip(read_parts(source, name, shape), read_parts(written, name, shape), strict=True)
    return all(_bits(a.to(dtype)).equal(_bits(b)) for a, b in pairs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: NaNs are equal to themselves, and 0 is not -0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def check_logits(plan: Plan) -> str:
    """Compare logits of the model in the source, as mtrl computes them, with those of what was written; a
    line.

    What was written is computed by transformers, or by mtrl where it is a ``torch_dist`` checkpoint. In
    float32, with both models in memory.

    Raises:
        CheckpointError: they differ by more than `MAX_LOGIT_DIFFERENCE`.
    """
    tokens = torch.randint(plan.config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    with open_source(plan.request.source, plan.source_format, plan.config) as source:
        expected = _logits(plan, _Cast(plan, source), tokens)
    if plan.request.to == "torch_dist":
        with open_source(plan.request.partial, "torch_dist", plan.config) as written:
            found, whose = _logits(plan, written, tokens), "mtrl"
    else:
        found, whose = _transformers_logits(plan.request.partial, tokens), "transformers"
    difference = float((expected - found).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise CheckpointError(
            f"logits differ by up to {difference:.3g}, more than {MAX_LOGIT_DIFFERENCE:g}, between the "
            f"source (mtrl) and {plan.request.partial} ({whose})"
        )
    return f"logits of {NUM_TOKENS} tokens within {difference:.1e} of the source's ({whose} against mtrl)"


class _Cast:
    """A source as it is after the plan's casts."""

    def __init__(self, plan: Plan, source: TypedSource) -> None:
        self._plan, self._source = plan, source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The source's."""
        return self._source.shapes()

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of ``box``, cast."""
        value = self._source.read(name, box)
        return value.to(self._plan.kinds[name][0]) if name in self._plan.kinds else value


def _logits(plan: Plan, source: TensorSource, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence by mtrl, in one process, float32."""
    from mtrl.models.builder import build_model
    from mtrl.models.hf import load_weights
    from mtrl.models.packed import PackedSegments
    from mtrl.parallel import groups

    was_started = dist.is_initialized()
    groups.init_distributed()
    layout = groups.create(RankLayout.from_spec(parse_training_spec("megatron:d1")))
    try:
        groups.seed_everything(1, layout)
        model = build_model(plan.config, layout)
        load_weights(model, source)
        segments = PackedSegments.from_lengths([len(tokens)], torch.device("cpu"))
        assert segments.positions_T is not None
        with torch.no_grad():
            logits = model.chunks[0].eval()(
                tokens[None], segments.positions_T[None], None, packed_seq_params=segments
            )
        found: torch.Tensor = logits[0, :, : plan.config.vocab_size]
        return found
    finally:
        groups.destroy()
        if not was_started:
            dist.destroy_process_group()


def _transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens[None]).logits[0]
    return found
