"""What has to travel for an engine to hold the trainer's weights.

``needs`` says what a rank's engine reads of each Hugging Face tensor, from the record of vLLM's own loader.
The plan (``nodes.py``) gives each needed element one source, so that a rank receives exactly the elements of
need minus have; ``rounds.py`` and ``windows.py`` turn it into lists of views, ``push.py`` runs through them.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from mtrl.models.boxes import Box
from mtrl.models.gather import held_boxes
from mtrl.models.hf_folder import SCALE_SUFFIX
from mtrl.models.transfers import Boxes
from mtrl.models.weight_map import WeightMap
from mtrl.parallel.agreement import gather_json
from mtrl.rollout.fp8_weights import block_box
from mtrl.rollout.loader_record import LoaderRecord, RecordedCopy
from mtrl.weight_push.nodes import NodePlan, plan_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one rank's engine reads: ``boxes``, disjoint, of each tensor; ``copies`` of each with their boxes.

    ``whole`` are tensors of which some copy reads what is no box (a transposed or repeated part): those are
    needed in full, and its loader's record is replayed on them.
    """

    boxes: dict[str, tuple[Box, ...]]
    copies: dict[str, tuple[tuple[Box, RecordedCopy], ...]]
    whole: frozenset[str]

    @classmethod
    def of(cls, record: LoaderRecord) -> "Needs":
        """From the record of a loader."""
        boxes: dict[str, list[Box]] = {}
        copies: dict[str, list[tuple[Box, RecordedCopy]]] = {}
        whole: set[str] = set()
        for copy in record.copies:
            ranges = copy.source_region.box(record.sources[copy.source])
            if ranges is None:
                whole.add(copy.source)
                continue
            copies.setdefault(copy.source, []).append((Box(ranges), copy))
            boxes.setdefault(copy.source, []).append(Box(ranges))
        for name in whole:
            copies.pop(name, None)
            boxes[name] = [Box.full(record.sources[name])]
        return cls(
            boxes={name: tuple(disjoint(held)) for name, held in boxes.items()},
            copies={name: tuple(found) for name, found in copies.items()},
            whole=frozenset(whole),
        )


def disjoint(boxes: Iterable[Box]) -> list[Box]:
    """The elements of ``boxes`` in boxes that do not overlap."""
    kept: list[Box] = []
    for box in dict.fromkeys(boxes):
        rest = [box]
        for other in kept:
            rest = [part for each in rest for part in each.subtract(other)]
        kept.extend(rest)
    return kept


def plan_push(
    weight_map: WeightMap, needs: Sequence[Boxes], node_of: Sequence[int], *, fp8: Collection[str] = ()
) -> NodePlan:
    """Who sends which box to whom; ``needs[r]`` are rank r's, on node ``node_of[r]``.

    The weights ``fp8`` travel with their scales. Pure; every rank computes the same.
    """
    held = sendable_boxes(weight_map, fp8)
    quantised, names = set(fp8), []
    for name in weight_map.hf_shapes():
        names += [name, name + SCALE_SUFFIX] if name in quantised else [name]
    needed = [name for name in names if any(name in need for need in needs)]
    return plan_nodes(_by_turns(needed, held, weight_map), held, needs, node_of)


def sendable_boxes(weight_map: WeightMap, fp8: Collection[str]) -> list[Boxes]:
    """Per rank, the boxes of weights that it holds, and of scales as `with_scale_boxes`."""
    return with_scale_boxes(held_boxes(weight_map), fp8)


def with_scale_boxes(held: Sequence[Boxes], fp8: Collection[str]) -> list[Boxes]:
    """Of the scales of ``fp8``, a rank has those of all the blocks that its boxes touch."""
    return [
        {
            **boxes,
            **{
                name + SCALE_SUFFIX: tuple(dict.fromkeys(map(block_box, boxes[name])))
                for name in fp8
                if name in boxes
            },
        }
        for boxes in held
    ]


def _by_turns(names: Sequence[str], held: Sequence[Boxes], weight_map: WeightMap) -> list[str]:
    """The names such that pipeline stages take turns, and all send from the first round on."""
    layout = weight_map.layout
    stage_of: dict[str, int] = {}
    for rank, boxes in enumerate(held):
        for name in boxes:
            stage_of.setdefault(name, layout.coordinates(rank).pp)
    queues = [
        [name for name in names if stage_of.get(name, 0) == stage] for stage in range(layout.spec.attn.pp)
    ]
    return [name for name in chain.from_iterable(zip_longest(*queues)) if name is not None]


def exchange_needs(needs: Needs) -> list[Boxes]:
    """All ranks' needed boxes. Collective over WORLD."""
    own = {name: [box.ranges for box in held] for name, held in needs.boxes.items()}
    return [
        {name: tuple(Box(tuple((a, b) for a, b in ranges)) for ranges in held) for name, held in each.items()}
        for each in gather_json(own)
    ]
