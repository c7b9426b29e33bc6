"""What a vLLM engine is built from: checks, what its config must be told, the engine, the tokenizer."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from mtrl.models.config import read_hf_config
from mtrl.models.families import load_model_config
from mtrl.parallel.device import current_device
from mtrl.parallel.errors import LayoutError, ModelError, RolloutError
from mtrl.parallel.spec import RolloutSpec
from mtrl.rollout.fp8_weights import check_sliced, quantization_config

MoeBackend = Literal["triton", "flashinfer_cutlass"]

_MAX_PREFILL_TOKENS = 8192  # of all prompts in one forward pass, on CPU


def check_spec(model_dir: Path, spec: RolloutSpec) -> None:
    """Check what can be before vLLM is imported: see `VllmEngine.create` for the errors."""
    if spec.backend != "vllm":
        raise RolloutError(
            f"{spec}: the only engine there is so far is vllm; write vllm:d{spec.dp}t{spec.tp}"
        )
    if spec.pp != 1:
        raise RolloutError(f"{spec}: engine pipeline parallelism is not supported; use t in place of p")
    if not dist.is_initialized():
        raise RolloutError("torch.distributed must be initialised before the engine is created")
    if dist.get_world_size() != spec.world_size:
        raise LayoutError(
            f"{spec} is for {spec.world_size} ranks, but {dist.get_world_size()} are running; the engine "
            f"lives on the trainer's ranks"
        )
    if not read_hf_config(model_dir).get("architectures"):
        raise ModelError(
            f"{model_dir / 'config.json'} names no architecture; write for instance "
            '"architectures": ["Qwen3MoeForCausalLM"]'
        )


def check_fp8(model_dir: Path, spec: RolloutSpec, *, expert_parallel: bool) -> None:
    """Check what FP8 weights need.

    Raises:
        RolloutError: not on a GPU.
        LayoutError: parts of linears would not be whole blocks.
    """
    if current_device().kind != "cuda":
        raise RolloutError("FP8 rollout weights need a GPU: vLLM's CPU build has no such kernels without AMX")
    check_sliced(load_model_config(model_dir), spec, expert_parallel=expert_parallel)


def compute_dtype(dtype: str) -> str:
    """What vLLM computes in: FP8 weights are multiplied by bfloat16 activations, quantised as they come."""
    return "bfloat16" if dtype == "fp8" else dtype


def overrides(model_dir: Path, *, fp8: bool = False) -> dict[str, Any]:
    """What vLLM must be told that ``config.json`` does not say, or says of the files and not of the weights.

    The trainer pushes dequantised weights, or for ``fp8`` quantises them itself. transformers 5 writes
    DeepSeek configs without two keys that vLLM reads, and whose absence it takes for another router
    (model_executor/models/deepseek_v2.py).
    """
    config = read_hf_config(model_dir)
    found: dict[str, Any] = {"quantization_config": None} if config.get("quantization_config") else {}
    if fp8:
        found["quantization_config"] = quantization_config(load_model_config(model_dir))
    if "DeepseekV3ForCausalLM" in config["architectures"]:
        router = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        found |= {key: value for key, value in router.items() if key not in config}
    return found


def device_arguments(
    *, max_model_len: int, max_num_seqs: int, fp8: bool, moe_backend: MoeBackend
) -> dict[str, Any]:
    """What vLLM is told of the kind of device."""
    if current_device().kind == "cuda":
        # Kernels that compute on weights in the layout they are loaded in, or in one that a push knows.
        return {"moe_backend": moe_backend, "linear_backend": "triton" if fp8 else "auto"}
    # A prompt that is prefilled in parts makes vLLM rewind its request's generator, which torch's CPU
    # generators cannot (v1/worker/gpu_model_runner.py, `set_offset`): prefill whole prompts.
    most = min(max(max_model_len, _MAX_PREFILL_TOKENS), max_num_seqs * max_model_len)
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": most}


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect no cycles meanwhile: importing vLLM makes a million objects that all stay, and each collection
    walks them all (0.3 to 0.9 s of a start of 5).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def transfer_config() -> Any:
    """Registers mtrl's push with vLLM; see ``vllm_transfer.py``."""
    from mtrl.rollout import vllm_transfer

    return vllm_transfer.transfer_config()


def build(arguments: dict[str, Any]) -> Any:
    """vLLM's engine for these arguments, one that leaves torch.distributed alone; RolloutError if it
    refuses.
    """
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        # At exit, and when collected, it would destroy the trainer's torch.distributed.
        llm.engine_core._finalizer.detach()
        return llm
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise RolloutError(f"vLLM cannot build an engine for {arguments['model']}: {error}") from error


def load_decoder(model_dir: Path) -> Any:
    """A function from token ids to text; it gives "" where the folder holds no tokenizer."""
    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return lambda tokens: ""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)
