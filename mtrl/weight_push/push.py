"""Push the trainer's weights into the rollout engine after an update.

Every rank receives what it lacks of the full tensors and hands them to its engine, which cuts out its
share. Right for every layout against every engine; the bytes are those of full tensors, not yet of the
engine's share.
"""

import torch

from mtrl.models.builder import Model
from mtrl.models.gather import TensorGather
from mtrl.rollout.protocol import RolloutEngine


class WeightPush:
    """A planned push from one model into one engine."""

    def __init__(self, model: Model, engine: RolloutEngine, dtype: torch.dtype) -> None:
        names = tuple(model.weight_map.hf_shapes())
        self._gather = TensorGather(model, [names] * model.groups.layout.world_size)
        self._engine, self._dtype = engine, dtype

    def run(self, *, policy_version: int) -> int:
        """Push, and make ``policy_version`` the engine's version. Collective over WORLD.

        Returns:
            Bytes that this rank received from other ranks.
        """
        before = self._gather.count.bytes_received
        self._engine.load_weights(self._gather.run(self._dtype), policy_version=policy_version)
        return self._gather.count.bytes_received - before
