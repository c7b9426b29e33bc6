"""The roles that weights play in a transformer, each with named dims.

A family says where each role lies in the Hugging Face checkpoint; a backend says where it lies in
its own parameters; neither knows the other. A symbol decides how a dim is sharded:

=====  ======================================  =========
v      vocabulary                              attn.tp
h      hidden
g      KV head groups                          attn.tp
r      query heads per KV head
k      1: the key or value head of a group
d      head dim
u      1: the gate or the up half
i      hidden size of a dense MLP              attn.tp
n      experts, as the router scores them
e      experts, as they are held               ffn.ep
j      hidden size of an expert                ffn.etp
=====  ======================================  =========
"""

from typing import Literal

from mtrl.parallel.layout import AxisName

Role = Literal[
    "embedding", "lm_head", "final_norm",
    "attention.norm", "attention.query", "attention.key", "attention.value", "attention.output",
    "attention.query_norm", "attention.key_norm",
    "mlp.norm", "mlp.gate", "mlp.up", "mlp.down",
    "moe.router", "expert.gate", "expert.up", "expert.down",
]  # fmt: skip

ROLE_SYMBOLS: dict[Role, tuple[str, ...]] = {
    "embedding": ("v", "h"),
    "lm_head": ("v", "h"),
    "final_norm": ("h",),
    "attention.norm": ("h",),
    "attention.query": ("g", "r", "d", "h"),
    "attention.key": ("g", "k", "d", "h"),
    "attention.value": ("g", "k", "d", "h"),
    "attention.output": ("h", "g", "r", "d"),
    "attention.query_norm": ("d",),
    "attention.key_norm": ("d",),
    "mlp.norm": ("h",),
    "mlp.gate": ("u", "i", "h"),
    "mlp.up": ("u", "i", "h"),
    "mlp.down": ("h", "i"),
    "moe.router": ("n", "h"),
    "expert.gate": ("e", "u", "j", "h"),
    "expert.up": ("e", "u", "j", "h"),
    "expert.down": ("e", "h", "j"),
}

SHARDED_BY: dict[str, AxisName] = {
    "v": "attn.tp",
    "g": "attn.tp",
    "i": "attn.tp",
    "e": "ffn.ep",
    "j": "ffn.etp",
}
