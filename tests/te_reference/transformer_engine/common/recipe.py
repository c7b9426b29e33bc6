"""Names of FP8 recipes, which Megatron subclasses at import. Nothing runs in FP8 here."""

import enum


class Format(enum.Enum):
    """Of numbers in FP8."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    def __init__(self, **fields: object) -> None:
        raise NotImplementedError("the reference of Transformer Engine has no FP8")


class DelayedScaling(_Recipe): ...


class Float8CurrentScaling(_Recipe): ...


class Float8BlockScaling(_Recipe): ...


class MXFP8BlockScaling(_Recipe): ...
