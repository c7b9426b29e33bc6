"""Names of the operation API, which Megatron's annotations read at import. Nothing is built from them."""

from torch import nn


class FusibleOperation(nn.Module): ...


class Sequential(nn.Sequential): ...
