"""What `show_layout` says of a push from a trainer's layout to engines': its bytes, and who needs fewer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.models.stages import Stages
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from mtrl.weight_push.fp8_kinds import Fp8Kinds
from mtrl.weight_push.kinds import Engines, Kind, kinds_of
from mtrl.weight_push.nodes import Numbers
from mtrl.weight_push.score import Score, compare, score

NUM_SHOWN = 8
ITEMSIZE = 2
"""Bytes of a weight on the wire: bfloat16. What a family keeps in float32 counts 4, what is in FP8 1."""

RolloutDtype = Literal["bf16", "fp8"]
KindsFor = Callable[[Engines], Sequence[Kind]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushScore:
    """The push that was asked for, and others into the same ranks, the fewest bytes first.

    ``remark`` is what to know of its bytes besides, or "".
    """

    given: Score
    others: Sequence[Score]
    dtype: RolloutDtype
    remark: str

    @classmethod
    def of(
        cls,
        train: str,
        rollout: str,
        model: Path,
        gpus_per_node: int,
        *,
        expert_parallel: bool,
        dtype: RolloutDtype = "bf16",
    ) -> "PushScore":
        """Of allocation strings and a Hugging Face folder, of which only ``config.json`` is read.

        The 4 bytes that ranks tell each other first for each part of a block that they share are not counted.

        Raises:
            SpecError, ModelError: a string or the config cannot be read; fp8 with experts that are fused.
            LayoutError: the model does not fit, or the two sides are of different sizes; fp8, and a rank of
                the engine would have no whole blocks.
        """
        spec = parse_training_spec(train)
        engines = Engines(spec=parse_rollout_spec(rollout), expert_parallel=expert_parallel)
        if spec.world_size != engines.spec.world_size:
            raise LayoutError(
                f"{spec} has {spec.world_size} ranks and {engines.spec} {engines.spec.world_size}; the "
                "engines live on the trainer's ranks"
            )
        config, layout = load_model_config(model), RankLayout.from_spec(spec)
        stages = Stages.balanced(config.num_layers, spec.attn.pp)
        kinds_for = _kinds_for(config, layout, stages, dtype)
        kinds = kinds_for(engines)
        return cls(
            given=score(kinds, layout, engines, gpus_per_node),
            others=compare(kinds_for, layout, engines, gpus_per_node),
            dtype=dtype,
            remark=_remark(kinds) if dtype == "fp8" else "",
        )

    def tables(self) -> Iterator[Table]:
        """The push that was asked for, and the rollout layouts with the fewest bytes."""
        given = self.given
        table = Table(
            title=f"a push in {self.dtype} to {given.engines}",
            caption=self.remark or None,
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("bytes", "most", "mean", "in all"):
            table.add_column(heading, justify="left" if heading == "bytes" else "right")
        rows = (
            ("an engine rank reads", given.needed),
            ("a rank receives", given.received),
            ("a node receives", given.into_nodes),
        )
        for what, numbers in rows:
            table.add_row(
                what, gigabytes(int(numbers.max())), gigabytes(_mean(numbers)), gigabytes(int(numbers.sum()))
            )
        table.add_row("on its rank already", "", f"{given.local_share:.1%}", "")
        yield table
        ranking = Table(
            title=f"rollout layouts whose ranks receive the fewest bytes, in {self.dtype}",
            title_justify="left",
        )
        for heading in ("", "rollout", "a rank reads", "a rank receives", "mean", "a node receives", "local"):
            ranking.add_column(heading, justify="left" if heading in ("", "rollout") else "right")
        for number, each in enumerate(self.others, start=1):
            is_given = each.engines == given.engines
            if number <= NUM_SHOWN or is_given:
                ranking.add_row(
                    f"{number}",
                    str(each.engines),
                    gigabytes(int(each.needed.max())),
                    gigabytes(int(each.received.max())),
                    gigabytes(_mean(each.received)),
                    gigabytes(int(each.into_nodes.max())),
                    f"{each.local_share:.1%}",
                    style="bold" if is_given else "",
                )
        yield ranking


def _kinds_for(config: ModelConfig, layout: RankLayout, stages: Stages, dtype: RolloutDtype) -> KindsFor:
    if dtype == "bf16":
        return lambda engines: kinds_of(config, layout, engines, stages, ITEMSIZE)
    return Fp8Kinds.of(config, layout, stages, ITEMSIZE)


def _remark(kinds: Sequence[Kind]) -> str:
    """On bytes in FP8: which weights are of what size, and what is not counted."""
    told = (
        "Ranks of the trainer share blocks, and first tell each other the largest magnitudes of their parts: "
        "those 4 bytes for each part of a block are not counted."
        if any(kind.overlaps for kind in kinds)
        else "No ranks of the trainer share a block, so that they need not tell each other anything first."
    )
    return f"Layers' linears are 1 byte an element and 4 for each 128 x 128, the rest bfloat16. {told}"


def _mean(numbers: Numbers) -> float:
    return float(numbers.mean())


def gigabytes(number: float) -> str:
    """Three digits, from 10^9 bytes; nothing is 0.

    >>> gigabytes(43_936_587_776), gigabytes(57_917_440)
    ('43.9 GB', '0.0579 GB')
    """
    return f"{number / 1e9:.3g} GB" if number < 999.5e9 else f"{number / 1e12:.3g} TB"
