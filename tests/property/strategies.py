"""What property tests draw from: specs, strings, and every legal spec up to a world size."""

from collections.abc import Iterator
from functools import cache

from hypothesis import settings
from hypothesis import strategies as st

from mtrl.parallel.spec import AttnAxes, FfnAxes, ParallelSpec, RolloutSpec

# No deadline: a busy machine is no broken law.
settings.register_profile("mtrl", deadline=None)
settings.load_profile("mtrl")

names = st.none() | st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@cache
def factorizations(number: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Every ordered way to write ``number`` as a product of ``parts`` positive integers."""
    if parts == 1:
        return ((number,),)
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return tuple((d, *rest) for d in divisors for rest in factorizations(number // d, parts - 1))


def legal_training_specs(max_world_size: int) -> Iterator[ParallelSpec]:
    """Every legal Megatron spec of at most this many ranks, once."""
    for world_size in range(1, max_world_size + 1):
        for pp, stage_size in factorizations(world_size, 2):
            for dp, tp, cp in factorizations(stage_size, 3):
                attn = AttnAxes(dp=dp, pp=pp, tp=tp, cp=cp)
                for edp, etp, ep in factorizations(stage_size, 3):
                    yield ParallelSpec(
                        backend="megatron", attn=attn, ffn=FfnAxes(edp=edp, pp=pp, etp=etp, ep=ep)
                    )


@st.composite
def training_specs(draw: st.DrawFn, max_world_size: int = 512) -> ParallelSpec:
    """Specs of every training backend; sizes are products of small primes, so that folding is common."""
    pp = draw(st.integers(1, 6))
    stage_size = draw(
        st.sampled_from(
            [size for size in range(1, max_world_size // pp + 1) if 2**9 * 3**3 * 5 * 7 % size == 0]
        )
    )
    dp, tp, cp = draw(st.sampled_from(factorizations(stage_size, 3)))
    edp, etp, ep = draw(st.sampled_from(factorizations(stage_size, 3)))
    backends = ["megatron", "archon"] + (["fsdp"] if etp == 1 else [])
    return ParallelSpec(
        backend=draw(st.sampled_from(backends)),
        name=draw(names),
        attn=AttnAxes(dp=dp, pp=pp, tp=tp, cp=cp),
        ffn=FfnAxes(edp=edp, pp=pp, etp=etp, ep=ep),
    )


@st.composite
def rollout_specs(draw: st.DrawFn, max_size: int = 8) -> RolloutSpec:
    """Specs of every sampling backend."""
    dp, tp, pp = (draw(st.integers(1, max_size)) for _ in range(3))
    return RolloutSpec(
        backend=draw(st.sampled_from(["vllm", "sglang"])), name=draw(names), dp=dp, tp=tp, pp=pp
    )


@st.composite
def near_spec_texts(draw: st.DrawFn) -> str:
    """Strings made of the grammar's own tokens in any order, most of them wrong."""
    tokens = [
        "megatron",
        "fsdp",
        "vllm",
        "attn",
        "ffn",
        "ffn:",
        "attn:",
        "(",
        ")",
        "|",
        ":",
        "[",
        "]",
        "+",
        " ",
    ]
    tokens += [f"{axis}{size}" for axis in "dptcex" for size in ("", 0, 1, 2, 3, 4)]
    prefix = draw(st.sampled_from(["", "megatron:", "megatron:(attn:", "vllm:", "megatron:(attn:d4|ffn:"]))
    return prefix + "".join(draw(st.lists(st.sampled_from(tokens), max_size=8)))
