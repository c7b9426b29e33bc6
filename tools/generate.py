"""Talk to a trained model: a checkpoint of a run, or any Hugging Face folder of a family mtrl knows.

    python tools/generate.py --model runs/quickstart/checkpoints/step_000260 --prompt "37+58="
    python tools/generate.py --model runs/my_run/checkpoints/step_000200 --chat --temperature 0.7

Without --prompt it answers each line of standard input. Answers go to standard output, all else to standard
error. The engine is the one that samples in training, alone in this process.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if not __package__:  # run as a file: import from the checkout it lies in, not from its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mtrl.batch import Prompt
from mtrl.data.load import to_prompt
from mtrl.data.records import Record
from mtrl.data.tokenizer import load_tokenizer
from mtrl.models.config import ModelConfig
from mtrl.models.families import load_model_config
from mtrl.models.hf_folder import weight_files
from mtrl.parallel.errors import ConfigError, MissingPackageError, ModelError, MtrlError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_LINE_TOKENS = 4096
"""Longest line that is answered where the model has room for it; --prompt may be longer."""

_KV_BLOCK_TOKENS = 128

_DEFAULT_NEW_TOKENS = 256

Answer: TypeAlias = Callable[[Prompt, int], str]
"""From a prompt and the most tokens to write, the text of the completion."""


def main(arguments: list[str] | None = None) -> int:
    """Answer the prompts, or each line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _answer_all(options)
    except (MtrlError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Let a trained model complete prompts.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--prompt", action="append", help="may be repeated; default: lines of standard input")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's turn in the chat template")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 256, or what fits")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    parser.add_argument("--seed", type=int, default=1, help="of the draws; no effect at temperature 0")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    return parser


def _answer_all(options: argparse.Namespace) -> None:
    if options.temperature < 0 or (options.max_new_tokens or 1) < 1:
        raise ConfigError("--temperature is 0 (greedy) or more, --max-new-tokens is 1 or more")
    if not options.model.is_dir():
        raise ModelError(
            f"no folder {options.model}; give a checkpoint, such as runs/NAME/checkpoints/step_N"
        )
    model, tokenizer = load_model_config(options.model), _load_tokenizer(options.model)
    weight_files(options.model)  # raises where there are none, long before an engine would
    prompts = [_prompt(text, n, tokenizer, options.chat) for n, text in enumerate(options.prompt or ())]
    longest = max((len(prompt.tokens) for prompt in prompts), default=_MAX_LINE_TOKENS)
    room = min(model.max_position_embeddings, longest + (options.max_new_tokens or _DEFAULT_NEW_TOKENS))
    num_new = [_num_new_tokens(prompt, options, room) for prompt in prompts]
    from mtrl.parallel import quiet

    quiet.install()
    open_engine = _transformers if options.engine == "transformers" else _vllm
    with open_engine(options, model, tokenizer, room) as answer:
        for prompt, most in zip(prompts, num_new, strict=True):
            print(answer(prompt, most), flush=True)
        if options.prompt is None:
            _answer_lines(answer, tokenizer, options, room)


def _answer_lines(answer: Answer, tokenizer: Any, options: argparse.Namespace, room: int) -> None:
    """Until the end of standard input; a line that cannot be answered does not end it."""
    if sys.stdin.isatty():
        print("one prompt a line; Ctrl-D ends it", file=sys.stderr)
    for number, line in enumerate(sys.stdin):
        try:
            prompt = _prompt(line.rstrip("\n"), number, tokenizer, options.chat)
            most = _num_new_tokens(prompt, options, room)
        except MtrlError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(answer(prompt, most), flush=True)


def _prompt(text: str, number: int, tokenizer: Any, chat: bool) -> Prompt:
    fields = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return to_prompt(Record(index=number, where=f"prompt {number + 1}", fields=fields), tokenizer)


def _num_new_tokens(prompt: Prompt, options: argparse.Namespace, room: int) -> int:
    """What was asked for, which must fit, or as many of the default as fit."""
    length, asked = len(prompt.tokens), options.max_new_tokens
    if length + (asked or 1) > room:
        raise ConfigError(
            f"a prompt of {length} tokens and --max-new-tokens {asked or 1} make more than the {room} there "
            "is room for; shorten one of them"
        )
    return int(asked or min(_DEFAULT_NEW_TOKENS, room - length))


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    return load_tokenizer(folder)


@contextmanager
def _vllm(options: argparse.Namespace, model: ModelConfig, tokenizer: Any, room: int) -> Iterator[Answer]:
    """The engine of training on one rank, with the folder's weights."""
    from mtrl.rollout import vllm_process

    try:
        vllm_process.check_version()
    except MissingPackageError as error:
        raise MissingPackageError(f"{error}; or add --engine transformers") from error
    from mtrl.parallel import groups
    from mtrl.parallel.spec import parse_rollout_spec
    from mtrl.rollout.protocol import SamplingSettings
    from mtrl.rollout.vllm_engine import VllmEngine

    groups.init_distributed()
    dtype = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
    is_fp32 = dtype in (None, "float32")
    engine = VllmEngine.create(
        options.model,
        parse_rollout_spec("vllm:d1"),
        max_model_len=room,
        max_num_seqs=1,
        dtype="float32" if is_fp32 else "bfloat16",
        seed=options.seed,
        kv_cache_bytes=_kv_cache_bytes(model, room, 4 if is_fp32 else 2),
    )
    engine.load_weights(_weights(weight_files(options.model), model), policy_version=0)

    def answer(prompt: Prompt, num_new_tokens: int) -> str:
        sampling = SamplingSettings(
            temperature=options.temperature,
            top_p=1.0,
            max_new_tokens=num_new_tokens,
            num_samples=1,
            stop_token_ids=(tokenizer.eos_token_id,),
        )
        return engine.generate([prompt], sampling, seed=options.seed)[0].text

    yield answer
    engine.shutdown()


def _kv_cache_bytes(model: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Keys and values of one sequence, and two blocks to spare."""
    num_blocks = -(-num_tokens // _KV_BLOCK_TOKENS) + 2
    return (
        2 * itemsize * model.num_layers * model.num_kv_heads * model.head_dim * num_blocks * _KV_BLOCK_TOKENS
    )


def _weights(files: Sequence[Path], model: ModelConfig) -> "Iterator[tuple[str, Tensor]]":
    """The files' tensors by name, one file open at a time."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  no mapping: it has no __iter__
                if not (model.tie_embeddings and key == "lm_head.weight"):
                    yield key, file.get_tensor(key)


@contextmanager
def _transformers(
    options: argparse.Namespace, model: ModelConfig, tokenizer: Any, room: int
) -> Iterator[Answer]:
    """transformers' own generation, slower; where there is no vLLM."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    network = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    torch.manual_seed(options.seed)
    draws = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}

    def answer(prompt: Prompt, num_new_tokens: int) -> str:
        tokens = torch.tensor([prompt.tokens])
        output = network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **(draws if options.temperature else {"do_sample": False}),
        )
        return str(tokenizer.decode(output[0, len(prompt.tokens) :], skip_special_tokens=True))

    yield answer


if __name__ == "__main__":
    sys.exit(main())
