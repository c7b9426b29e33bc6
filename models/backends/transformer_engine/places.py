"""Where the ``transformer_engine`` backend keeps each role, as far as it differs from ``torch_native``.

A norm in front of a linear is one module with it, and so are the experts' weights apart: ``weight0``,
``weight1``, ... in the order of this rank's experts. What modules keep besides parameters (``_extra_state``,
FP8's scales) is neither parameter nor buffer, and no weight.
"""

from mtrl.models.backends.torch_native.places import places as native_places
from mtrl.models.boxes import Place
from mtrl.models.config import ModelConfig
from mtrl.models.roles import Role
from mtrl.models.weight_map import Places

_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_EXPERTS = _LAYER + "mlp.experts."


def places(config: ModelConfig) -> Places:
    """The place of every role there is; a model uses those that its weight table names."""
    fc1, fc2 = (_EXPERTS + f"linear_fc{number}.weight{{expert}}" for number in (1, 2))
    own: dict[Role, Place] = {
        "mla.query_down_norm": Place(name=_ATTENTION + "linear_q_up_proj.layer_norm_weight", pattern="a"),
        "mla.kv_down_norm": Place(name=_ATTENTION + "linear_kv_up_proj.layer_norm_weight", pattern="B"),
        "expert.gate": Place(name=fc1, pattern="(u j) h", within=(("u", 0, 2),)),
        "expert.up": Place(name=fc1, pattern="(u j) h", within=(("u", 1, 2),)),
        "expert.gate_up": Place(name=fc1, pattern="(c j) h"),
        "expert.down": Place(name=fc2, pattern="h j"),
    }
    if config.mla is None:
        # Two projections read the norm of latent attention, so that one stays by itself.
        own["attention.norm"] = Place(name=_ATTENTION + "linear_qkv.layer_norm_weight", pattern="h")
    return {**native_places(config), **own}


def dense_places() -> Places:
    """What a layer with a dense MLP keeps elsewhere; in front of experts the router reads the norm too."""
    return {"mlp.norm": Place(name=_LAYER + "mlp.linear_fc1.layer_norm_weight", pattern="h")}
