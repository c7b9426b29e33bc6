"""What of mtrl each package turns on: the other half of capability_table.py. Pure; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from mtrl.parallel.capability_table import Hardware, PackageName

FeatureName = Literal[
    "train", "rollout", "fused_adam", "fused_logprobs",
    "transformer_engine", "fp8_delayed", "fp8_blockwise", "mxfp8", "deepep",
    "hybridep", "permute_fusion", "tp_comm_overlap", "wgrad_fusion", "bf16_moments", "host_optimizer",
    "fp8_rollout", "flashinfer_experts", "sleep",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """Something of mtrl: ``any_of`` are alternatives, ``symbols`` are asked for besides the package's own."""

    name: FeatureName
    what: str
    any_of: tuple[PackageName, ...]
    hardware: Hardware | None = None
    symbols: tuple[str, ...] = ()
    built: bool = True


FEATURES: tuple[Feature, ...] = (
    Feature(name="train", what="SFT and the trainer's half of GRPO", any_of=("megatron-core",)),
    Feature(name="rollout", what="GRPO with vLLM", any_of=("vllm",)),
    Feature(name="fused_adam", what="Adam in one kernel", any_of=("transformer-engine", "apex")),
    Feature(
        name="fused_logprobs",
        what="log-probabilities in one kernel",
        any_of=("flash-linear-attention",),
        symbols=("fla.modules.fused_cross_entropy:cross_entropy_loss",),
    ),
    Feature(
        name="transformer_engine",
        what="model.backend: transformer_engine",
        any_of=("transformer-engine",),
    ),
    Feature(
        name="fp8_delayed",
        what="FP8 training with delayed scales",
        any_of=("transformer-engine",),
        hardware=Hardware(
            sm=((8, 9),),
            or_newer=True,
            cuda=(12, 1),
            source="check_fp8_support in transformer_engine/pytorch/fp8.py",
        ),
    ),
    Feature(
        name="fp8_blockwise",
        what="FP8 training in blocks, as DeepSeek-V3",
        any_of=("transformer-engine",),
        hardware=Hardware(
            sm=((9, 0),),
            or_newer=True,
            cuda=(12, 9),
            source="Transformer Engine: check_fp8_block_scaling_support",
        ),
        symbols=("transformer_engine.common.recipe:Float8BlockScaling",),
    ),
    Feature(
        name="mxfp8",
        what="FP8 training in blocks of 32",
        any_of=("transformer-engine",),
        hardware=Hardware(
            sm=((10, 0),), or_newer=True, cuda=(12, 8), source="Transformer Engine's installation guide"
        ),
        symbols=("transformer_engine.common.recipe:MXFP8BlockScaling",),
    ),
    Feature(name="deepep", what="actor.moe.dispatcher: deepep", any_of=("deep_ep",)),
    Feature(
        name="hybridep",
        what="actor.moe.dispatcher: hybridep",
        any_of=("deep_ep",),
        symbols=("deep_ep:HybridEPBuffer",),
    ),
    Feature(
        name="permute_fusion",
        what="actor.moe.permute_fusion",
        any_of=("transformer-engine",),
        symbols=("transformer_engine.pytorch.permutation:moe_permute",),
    ),
    Feature(
        name="tp_comm_overlap",
        what="actor.tp_comm_overlap",
        any_of=("transformer-engine",),
        hardware=Hardware(
            sm=((9, 0),),
            or_newer=True,
            cuda=(12, 1),
            source="Transformer Engine: initialize_ub asks for CUDA Multicast",
        ),
        symbols=("transformer_engine.pytorch:UserBufferQuantizationMode",),
    ),
    Feature(
        name="bf16_moments",
        what="actor.optimizer.moments: bf16",
        any_of=("transformer-engine",),
    ),
    Feature(
        name="host_optimizer",
        what="actor.optimizer.offload_fraction: an optimizer that steps on the host",
        any_of=("megatron-core",),
        hardware=Hardware(
            sm=(),
            or_newer=True,
            cuda=None,
            source="HybridDeviceOptimizer in megatron/core/optimizer/cpu_offloading takes what is_cuda there",
        ),
    ),
    Feature(
        name="wgrad_fusion",
        what="weight gradients added in fp32 by the product itself",
        any_of=("apex",),
        symbols=("fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp32",),
        built=False,
    ),
    Feature(
        name="sleep",
        what="rollout.sleep: an engine that gives its memory back",
        any_of=("vllm",),
        hardware=Hardware(
            sm=((7, 0),), or_newer=True, cuda=(12, 0), source="vLLM: its allocator for sleep mode"
        ),
    ),
    Feature(
        name="flashinfer_experts",
        what="rollout.moe_backend: flashinfer_cutlass",
        any_of=("vllm",),
        symbols=("flashinfer.fused_moe:cutlass_fused_moe",),
        hardware=Hardware(
            sm=((9, 0), (10, 0), (12, 0)),
            or_newer=False,
            cuda=None,
            source="vLLM 0.32: FlashInferExperts._supports_current_device",
        ),
    ),
    Feature(
        name="fp8_rollout",
        what="rollout.dtype: fp8",
        any_of=("vllm",),
        hardware=Hardware(
            sm=((8, 9),),
            or_newer=True,
            cuda=None,
            source="Triton's e4m3 (fp8e4nv), of which vLLM's products of blocks are made",
        ),
    ),
)
"""``fp8`` in a requirement stands for any of the three fp8 features (capabilities.py)."""
