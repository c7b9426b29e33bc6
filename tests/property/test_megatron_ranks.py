"""Our rank lists against Megatron-Core's own `RankGenerator`, for every legal spec up to 64 ranks.

Megatron builds its groups from two generators, one for attention and one for experts, so each is asked once
for every distinct set of sizes; every spec is then compared with the two that belong to it.
"""

from functools import cache

from mtrl.parallel import host
from mtrl.parallel.layout import AxisName, Groups, RankLayout
from tests.property.strategies import legal_training_specs

host.install()  # before anything imports Megatron, for the other tests of this process

from megatron.core.parallel_state import RankGenerator  # noqa: E402

MAX_WORLD_SIZE = 64
ORDER = "tp-cp-ep-dp-pp"
# ours, and the token under which Megatron lists the same groups
ATTN_TOKENS: dict[tuple[AxisName, ...], str] = {
    ("attn.tp",): "tp",
    ("attn.cp",): "cp",
    ("attn.dp",): "dp",
    ("attn.pp",): "pp",
    ("attn.dp", "attn.cp"): "dp-cp",
    ("attn.tp", "attn.cp"): "tp-cp",
    ("attn.tp", "attn.pp"): "tp-pp",
    ("attn.tp", "attn.dp", "attn.cp"): "tp-dp-cp",
}
FFN_TOKENS: dict[tuple[AxisName, ...], str] = {
    ("ffn.etp",): "tp",
    ("ffn.ep",): "ep",
    ("ffn.edp",): "dp",
    ("ffn.pp",): "pp",
    ("ffn.etp", "ffn.ep"): "tp-ep",
    ("ffn.etp", "ffn.ep", "ffn.pp"): "tp-ep-pp",
}


@cache
def megatron_groups(tp: int, cp: int, ep: int, dp: int, pp: int, token: str) -> Groups:
    generator = RankGenerator(tp=tp, ep=ep, dp=dp, pp=pp, cp=cp, order=ORDER)
    return tuple(tuple(group) for group in generator.get_ranks(token))


def test_rank_lists_equal_megatron_s_for_every_legal_spec_up_to_64_ranks() -> None:
    num_specs = 0
    for spec in legal_training_specs(MAX_WORLD_SIZE):
        layout, attn, ffn = RankLayout.from_spec(spec), spec.attn, spec.ffn
        for axes, token in ATTN_TOKENS.items():
            expected = megatron_groups(attn.tp, attn.cp, 1, attn.dp, attn.pp, token)
            assert layout.product_groups(*axes) == expected, (str(spec), axes)
        for axes, token in FFN_TOKENS.items():
            expected = megatron_groups(ffn.etp, 1, ffn.ep, ffn.edp, ffn.pp, token)
            assert layout.product_groups(*axes) == expected, (str(spec), axes)
        num_specs += 1
    assert num_specs == 27_642  # the sum over worlds n and stages p | n of d3(n/p)**2
