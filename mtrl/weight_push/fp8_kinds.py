"""The kinds of a push to engines with FP8 weights: elements of one byte, and scales as kinds of their own.

Pure. The rules are those of ``fp8_weights.py``: which weights, and which engines are refused. What ranks tell
each other first of blocks that they share, 4 bytes for each part of a block (``fp8_images.py``), is no kind
and not counted: who is told depends on who sends, so on the plan.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mtrl.models.boxes import Range
from mtrl.models.config import ModelConfig
from mtrl.models.hf_folder import SCALE_SUFFIX, SQUARE
from mtrl.models.stages import Stages
from mtrl.parallel.layout import RankLayout
from mtrl.rollout.fp8_weights import block_box, check_sliced, fp8_names
from mtrl.weight_push.kinds import Engines, Kind, kinds_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Kinds:
    """Makes the kinds of one trainer for any engines; ``names`` are the weights in FP8, ``itemsize`` is as of
    `kinds_of`, for all others.
    """

    config: ModelConfig
    layout: RankLayout
    stages: Stages
    itemsize: int
    names: frozenset[str]

    @classmethod
    def of(cls, config: ModelConfig, layout: RankLayout, stages: Stages, itemsize: int) -> "Fp8Kinds":
        """Raises ModelError for families that have no FP8 engines."""
        names = frozenset(fp8_names(config))
        return cls(config=config, layout=layout, stages=stages, itemsize=itemsize, names=names)

    def __call__(self, engines: Engines) -> tuple[Kind, ...]:
        """Scales follow their weights.

        Raises:
            LayoutError: the model does not fit one side's layout, or of a linear an engine's rank has no
                whole blocks.
        """
        kinds = kinds_of(self.config, self.layout, engines, self.stages, self.itemsize)
        check_sliced(self.config, engines.spec, expert_parallel=engines.expert_parallel)
        return tuple(itertools.chain.from_iterable(map(self._quantised, kinds)))

    def _quantised(self, kind: Kind) -> Iterator[Kind]:
        layer = next(layer for held in kind.stages.values() for layer in held)
        if kind.names((layer,), (0, 1))[0] not in self.names:
            yield kind
            return
        yield replace(kind, itemsize=1)
        yield replace(
            kind,
            name=kind.name + SCALE_SUFFIX,
            shape=SQUARE.grid(kind.shape),
            itemsize=4,
            trainer=_blocks(kind, kind.trainer),
            engine=_blocks(kind, kind.engine),
        )


def _blocks(kind: Kind, ranges: Iterable[Range]) -> tuple[Range, ...]:
    """All blocks that each range of a weight's ``dim`` touches: who holds a part has the scale."""
    dim = kind.dim
    if dim is None:
        return tuple(ranges)
    return tuple(block_box(kind.box(along, (0, 0))).ranges[dim] for along in ranges)
