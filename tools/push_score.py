"""What `show_layout` says of a push from a trainer's layout to engines': its bytes, and who needs fewer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mtrl.models.families import load_model_config
from mtrl.models.stages import Stages
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_rollout_spec, parse_training_spec
from mtrl.weight_push.kinds import Engines, kinds_of
from mtrl.weight_push.nodes import Numbers
from mtrl.weight_push.score import Score, compare, score

NUM_SHOWN = 8
ITEMSIZE = 2
"""Bytes of a weight on the wire: bfloat16. What a family keeps in float32 counts 4; FP8 is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushScore:
    """The push that was asked for, and others into the same ranks, the fewest bytes first."""

    given: Score
    others: Sequence[Score]

    @classmethod
    def of(
        cls, train: str, rollout: str, model: Path, gpus_per_node: int, *, expert_parallel: bool
    ) -> "PushScore":
        """Of allocation strings and a Hugging Face folder, of which only ``config.json`` is read.

        Raises:
            SpecError, ModelError: a string or the config cannot be read.
            LayoutError: the model does not fit, or the two sides are of different sizes.
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
        kinds = kinds_of(config, layout, engines, stages, ITEMSIZE)
        return cls(
            given=score(kinds, layout, engines, gpus_per_node),
            others=compare(config, layout, engines, stages, itemsize=ITEMSIZE, gpus_per_node=gpus_per_node),
        )

    def tables(self) -> Iterator[Table]:
        """The push that was asked for, and the rollout layouts with the fewest bytes."""
        given = self.given
        table = Table(title=f"a push to {given.engines}, in bfloat16", title_justify="left")
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
        ranking = Table(title="rollout layouts whose ranks receive the fewest bytes", title_justify="left")
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


def _mean(numbers: Numbers) -> float:
    return float(numbers.mean())


def gigabytes(number: float) -> str:
    """Three digits, from 10^9 bytes; nothing is 0.

    >>> gigabytes(43_936_587_776), gigabytes(57_917_440)
    ('43.9 GB', '0.0579 GB')
    """
    return f"{number / 1e9:.3g} GB" if number < 999.5e9 else f"{number / 1e12:.3g} TB"
