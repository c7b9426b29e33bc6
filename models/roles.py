"""The roles that weights play in a transformer, each with named dims.

A family says where each role lies in the Hugging Face checkpoint; a backend says where it lies in
its own parameters; neither knows the other. A symbol decides how a dim is sharded:

=====  =============================================  =========
v      vocabulary                                     attn.tp
h      hidden
g      KV head groups                                 attn.tp
r      query heads per KV head
k      1: the key or value head of a group
d      head dim
u      1: the gate or the up half
c      2: gate, then up
o      1: one output
i      hidden size of a dense MLP                     attn.tp
s      hidden size of the shared expert               attn.tp
n      experts, as the router scores them
e      experts, as they are held                      ffn.ep
j      hidden size of an expert                       ffn.etp
m      heads of latent attention                      attn.tp
a      query rank
b, B   KV rank: with the rotary key's dims, and without
q, l   dims of all query heads, and of all key heads
x      dims of a latent query or key head
y      dims of a latent key without position, and value
w      dims of a latent value head
=====  =============================================  =========
"""

from typing import Literal

from mtrl.parallel.layout import AxisName

Role = Literal[
    "embedding", "lm_head", "final_norm",
    "attention.norm", "attention.query", "attention.key", "attention.value", "attention.output",
    "attention.query_norm", "attention.key_norm", "attention.query_norm_all", "attention.key_norm_all",
    "attention.query_bias", "attention.key_bias", "attention.value_bias", "attention.output_bias",
    "attention.sinks",
    "mla.query", "mla.query_down", "mla.query_down_norm", "mla.query_up",
    "mla.kv_down", "mla.kv_down_norm", "mla.kv_up", "mla.output",
    "mlp.norm", "mlp.gate", "mlp.up", "mlp.down",
    "moe.router", "moe.router_bias", "moe.selection_bias",
    "expert.gate", "expert.up", "expert.down", "expert.gate_up",
    "expert.gate_up_bias", "expert.down_bias",
    "shared.gate", "shared.up", "shared.down", "shared.router",
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
    "attention.query_norm_all": ("q",),
    "attention.key_norm_all": ("l",),
    "attention.query_bias": ("g", "r", "d"),
    "attention.key_bias": ("g", "k", "d"),
    "attention.value_bias": ("g", "k", "d"),
    "attention.output_bias": ("h",),
    "attention.sinks": ("g", "r"),
    "mla.query": ("m", "x", "h"),
    "mla.query_down": ("a", "h"),
    "mla.query_down_norm": ("a",),
    "mla.query_up": ("m", "x", "a"),
    "mla.kv_down": ("b", "h"),
    "mla.kv_down_norm": ("B",),
    "mla.kv_up": ("m", "y", "B"),
    "mla.output": ("h", "m", "w"),
    "mlp.norm": ("h",),
    "mlp.gate": ("u", "i", "h"),
    "mlp.up": ("u", "i", "h"),
    "mlp.down": ("h", "i"),
    "moe.router": ("n", "h"),
    "moe.router_bias": ("n",),
    "moe.selection_bias": ("n",),
    "expert.gate": ("e", "u", "j", "h"),
    "expert.up": ("e", "u", "j", "h"),
    "expert.down": ("e", "h", "j"),
    "expert.gate_up": ("e", "c", "j", "h"),
    "expert.gate_up_bias": ("e", "c", "j"),
    "expert.down_bias": ("e", "h"),
    "shared.gate": ("u", "s", "h"),
    "shared.up": ("u", "s", "h"),
    "shared.down": ("h", "s"),
    "shared.router": ("o", "h"),
}

SHARDED_BY: dict[str, AxisName] = {
    "v": "attn.tp",
    "g": "attn.tp",
    "i": "attn.tp",
    "s": "attn.tp",
    "m": "attn.tp",
    "e": "ffn.ep",
    "j": "ffn.etp",
}
