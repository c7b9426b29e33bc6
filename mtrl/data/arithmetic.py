"""The quickstart's task, made from nothing: two-digit addition, and a tokenizer for it.

``make_arithmetic("data/arithmetic", seed=1, num_eval=500)`` writes::

    train.jsonl   {"prompt": "37+58=", "answer": "95"}        for RL
    sft.jsonl     {"prompt": "37+58=", "completion": "95"}    the same prompts, for the warm-up
    eval.jsonl    as train.jsonl; held out
    tokenizer/    tokenizer.json, tokenizer_config.json

A held-out sum is held out both ways round: with ``37+58=`` in eval.jsonl, neither it nor ``58+37=`` is
in the others. Guessing the most common sum (109) is right for 1.1 % of all pairs.
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from mtrl.parallel.errors import ConfigError, OutputExistsError

SMALLEST, LARGEST = 10, 99
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-*/=().,:;<>!?% \n"

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticTask:
    """Where `make_arithmetic` wrote what."""

    train: Path
    sft: Path
    eval: Path
    tokenizer: Path
    num_train: int
    num_eval: int


def make_arithmetic(out_dir: str | Path, seed: int, num_eval: int = 500) -> ArithmeticTask:
    """Write the task's files and tokenizer; the same arguments give the same bytes.

    ``num_eval`` held-out prompts, each of a different sum of two numbers from 10 to 99. Files that hold
    these bytes already are left as they are; others raise `OutputExistsError` before anything is written.
    """
    train, held_out = split_pairs(seed, num_eval)
    out = Path(out_dir)
    task = ArithmeticTask(
        train=out / "train.jsonl",
        sft=out / "sft.jsonl",
        eval=out / "eval.jsonl",
        tokenizer=out / "tokenizer",
        num_train=len(train),
        num_eval=len(held_out),
    )
    contents = {
        task.train: _jsonl({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in train),
        task.sft: _jsonl({"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in train),
        task.eval: _jsonl({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in held_out),
        task.tokenizer / "tokenizer.json": build_tokenizer().to_str(pretty=True) + "\n",
        task.tokenizer / "tokenizer_config.json": json.dumps(_tokenizer_config(), indent=2) + "\n",
    }
    _write_all(contents)
    return task


def split_pairs(seed: int, num_eval: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the shuffled (train, held out) pairs of addends; they share no sum, either way round."""
    numbers = range(SMALLEST, LARGEST + 1)
    unordered = [(a, b) for a in numbers for b in numbers if a <= b]
    if not 1 <= num_eval < len(unordered):
        raise ConfigError(
            f"num_eval={num_eval}: there are {len(unordered)} sums; hold out 1 to {len(unordered) - 1}"
        )
    source = random.Random(f"mtrl.data.arithmetic/{seed}")
    unordered = _shuffled(unordered, source)
    held_out = [(a, b) if source.random() < 0.5 else (b, a) for a, b in unordered[:num_eval]]
    train = [pair for a, b in unordered[num_eval:] for pair in dict.fromkeys([(a, b), (b, a)])]
    return _shuffled(train, source), held_out


def build_tokenizer() -> Tokenizer:
    """Return the character-level tokenizer: 32 ids, ``<bos>`` put before every text."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    # BPE without merges: characters stay as they are.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _tokenizer_config() -> dict[str, object]:
    pad, bos, eos, unk = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": _CHAT_TEMPLATE,
    }


def _shuffled(pairs: list[tuple[int, int]], source: random.Random) -> list[tuple[int, int]]:
    # random() is the one draw whose sequence Python promises to keep; shuffle() is not.
    return [pair for _, pair in sorted((source.random(), pair) for pair in pairs)]


def _jsonl(records: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write_all(contents: dict[Path, str]) -> None:
    for path, text in contents.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise OutputExistsError(
                f"{path} exists and holds something else; give another folder, or remove it first"
            )
    for path, text in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def main() -> None:
    """``python -m mtrl.data.arithmetic --out data/arithmetic``."""
    parser = argparse.ArgumentParser(description="Make the two-digit addition task and its tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="which prompts are held out, and the order")
    parser.add_argument("--num-eval", type=int, default=500, help="how many prompts to hold out")
    given = parser.parse_args()
    task = make_arithmetic(given.out, given.seed, given.num_eval)
    print(f"wrote {task.num_train} training and {task.num_eval} held-out prompts to {given.out}")


if __name__ == "__main__":
    main()
