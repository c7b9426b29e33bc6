"""The config's sections about arithmetic and communication on accelerators.

Part of the tree of ``config.py``, under the same rules. What of it a machine cannot do is refused before
launch (`acceleration.py`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mtrl.config_types import NonNegativeInt, PositiveInt, Section

TrainingPrecision = Literal["fp32", "bf16", "fp8_blockwise", "fp8_delayed", "mxfp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Section(Section):
    """How linears compute in FP8; the defaults only, where ``model.precision`` is fp32 or bf16."""

    key: ClassVar[str] = "model.fp8"

    gradients: Literal["auto", "e4m3", "e5m2"] = "auto"
    """Format of gradients; weights and activations are e4m3. Megatron calls e5m2 here ``hybrid``. ``auto``:
    e5m2 for fp8_delayed, whose one scale a tensor needs its range, e4m3 for blocks."""

    products: Literal["dequantised", "scaled_mm"] = "dequantised"
    """torch_native's: of what the FP8 numbers stand for, in fp32, or torch's own products of FP8 numbers, on
    a CPU. The same but for rounding; no effect on transformer_engine."""

    bf16_first_layers: NonNegativeInt = 0
    """Layers at the beginning of the model that stay bf16; not with fp8_delayed."""

    bf16_last_layers: NonNegativeInt = 0
    """Layers at its end that stay bf16; not with fp8_delayed. Embeddings, routers and the output layer
    always do."""

    parameters: bool = False
    """Keep the weights of these linears in FP8, with fp32 masters and no bf16 copy, and gather them in half
    the bytes. For transformer_engine with fp8_blockwise and the distributed optimizer. Steps and checkpoints
    are those of bf16 weights that are quantised for each product; a push gives the engine, from a copy in
    bf16, the weights that the trainer multiplies by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSection(Section):
    """How tokens travel to experts and back; dense models take the defaults only."""

    key: ClassVar[str] = "actor.moe"

    dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    """Megatron's dispatcher. ``alltoall`` sends each token to the ranks of its experts, ``allgather`` every
    token to all ranks of ``ffn.ep`` and ``ffn.etp``: less to wait for with few ranks or many experts a
    token. ``deepep`` and ``hybridep`` are DeepEP's kernels over NVLink and RDMA, through Megatron's flex."""

    num_sms: PositiveInt | None = None
    """SMs that DeepEP's kernels take from the experts' products, an even number. null: for deepep 20 within a
    node, Megatron's default, and 24 across, with which DeepEP measures; for hybridep Megatron's. Its buffers'
    sizes follow from hidden size and ranks. No effect on other dispatchers."""

    permute_fusion: bool = False
    """Sort tokens by expert, and back, in one kernel of Transformer Engine's."""

    shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel; needs alltoall and a model that has them."""

    overlap_expert_communication: bool = False
    """Megatron's ``overlap_moe_expert_parallel_comm``: one microbatch's tokens travel while another's are
    computed. Needs e2 or more, alltoall or a DeepEP dispatcher, bf16, and with pipeline stages
    ``virtual_pipeline_size``."""
