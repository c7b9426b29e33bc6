"""Records to what training takes: `load_samples` for SFT, `load_prompts` for RL.

What a record may be, by its keys (others are left alone, so data may carry notes)::

    {"prompt", "completion"}      SFT   loss on the completion and the end-of-sequence token put after it
    {"messages"}                  SFT   loss on the assistant's turns; see chat.py
                                  RL    the last turn is not the assistant's; "answer" is optional
    {"input_ids", "loss_mask"}    SFT   as they are
    {"prompt", "answer"}          RL    "answer" is what the reward compares with; optional

Sequences are never cut: one that is too long is an error, or is left out when ``overlong="drop"``.
Not here: reading files (records.py), order (order.py).
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from mtrl.batch import Prompt, Sample
from mtrl.data.chat import checked_messages, conversation_tokens, render
from mtrl.data.records import Record, read_records
from mtrl.parallel.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Overlong = Literal["error", "drop"]
Item = TypeVar("Item", Sample, Prompt)

logger = logging.getLogger(__name__)


def load_samples(
    path: str | Path, tokenizer: "PreTrainedTokenizerFast", *, max_length: int, overlong: Overlong = "error"
) -> list[Sample]:
    """Return the SFT samples of a JSONL file or ``datasets`` folder; ``sample_id`` is the record's index.

    ``max_length`` counts tokens of the whole sequence. Raises `DataError` naming file and line.
    """
    items = ((record, _sample(record, tokenizer)) for record in read_records(path))
    return list(_within(items, max_length, overlong, key="max_length", path=path))


def load_prompts(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_prompt_length: int,
    limit: int | None = None,
    overlong: Overlong = "error",
) -> list[Prompt]:
    """Return the RL prompts of a JSONL file or ``datasets`` folder; ``prompt_id`` is the record's index.

    ``max_prompt_length`` counts tokens; ``limit`` keeps the first so many prompts and reads no further.
    """
    items = ((record, to_prompt(record, tokenizer)) for record in read_records(path))
    return list(
        islice(_within(items, max_prompt_length, overlong, key="max_prompt_length", path=path), limit)
    )


def _within(
    items: Iterable[tuple[Record, Item]], bound: int, overlong: Overlong, *, key: str, path: str | Path
) -> Iterator[Item]:
    dropped = kept = 0
    for record, item in items:
        length = len(item.tokens)
        if length <= bound:
            kept += 1
            yield item
        elif overlong == "drop":
            dropped += 1
        else:
            raise record.error(
                f"is {length} tokens long, more than {key}={bound}; raise it to {length}, or set "
                'overlong to "drop"'
            )
    if dropped:
        logger.warning(
            "%s: left out %d of %d records longer than %s=%d", path, dropped, dropped + kept, key, bound
        )
    if kept == 0:
        raise DataError(f"{path}: all {dropped} records are longer than {key}={bound}; raise it")


def _sample(record: Record, tokenizer: "PreTrainedTokenizerFast") -> Sample:
    keys = record.fields.keys()
    if "messages" in keys:
        tokens, mask = conversation_tokens(record, checked_messages(record), tokenizer)
    elif {"prompt", "completion"} <= keys:
        tokens, mask = _completion_tokens(record, tokenizer)
    elif {"input_ids", "loss_mask"} <= keys:
        tokens, mask = _given_tokens(record, tokenizer)
    else:
        raise record.error(
            f'has the keys {_listed(keys)}; SFT needs "prompt" and "completion", or "messages", '
            'or "input_ids" and "loss_mask"'
        )
    if not any(mask):
        raise record.error("no token is trained on; at least one must be")
    if mask[0]:
        raise record.error(
            "the first token has nothing before it to be predicted from; its loss_mask must be 0"
        )
    return Sample(sample_id=record.index, tokens=tuple(tokens), loss_mask=tuple(mask))


def to_prompt(record: Record, tokenizer: "PreTrainedTokenizerFast") -> Prompt:
    """Return the RL prompt that a record holds; raises `DataError` where it holds none."""
    keys = record.fields.keys()
    answer = _text(record, "answer") if "answer" in keys else ""
    if "messages" in keys:
        messages = checked_messages(record)
        if messages[-1]["role"] == "assistant":
            raise record.error(
                "the last message is the assistant's, and the policy is to write it; leave it out"
            )
        text = render(record, messages, tokenizer, for_generation=True)
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
    elif "prompt" in keys:
        text = _text(record, "prompt")
        tokens = _prompt_tokens(record, text, tokenizer)
    else:
        raise record.error(
            f'has the keys {_listed(keys)}; RL needs "prompt" or "messages", and may have "answer"'
        )
    if not tokens:
        raise record.error("the prompt is empty; give at least one token")
    return Prompt(prompt_id=record.index, tokens=tuple(tokens), text=text, answer=answer)


def _completion_tokens(record: Record, tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[bool]]:
    # Apart, not as one text: in RL the prompt is tokenized alone and the policy continues its tokens.
    prompt = _prompt_tokens(record, _text(record, "prompt"), tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token; set it in tokenizer_config.json"
        )
    if not prompt:
        raise record.error("the prompt is empty and the tokenizer puts no bos token before it; give a prompt")
    written = tokenizer.encode(_text(record, "completion"), add_special_tokens=False)
    completion = [*written, tokenizer.eos_token_id]
    return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)


def _prompt_tokens(record: Record, text: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    tokens = list(tokenizer.encode(text))
    # Some tokenizers end every text; a prompt that is to be continued must stay open.
    closes = tokenizer.eos_token is not None and not text.endswith(tokenizer.eos_token)
    return tokens[:-1] if closes and tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _given_tokens(record: Record, tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[bool]]:
    tokens, mask = record.fields["input_ids"], record.fields["loss_mask"]
    if not isinstance(tokens, list) or not isinstance(mask, list) or len(tokens) != len(mask) or not tokens:
        raise record.error('"input_ids" and "loss_mask" must be lists of one length, at least 1')
    for position, (token, flag) in enumerate(zip(tokens, mask, strict=True)):
        if type(token) is not int or not 0 <= token < len(tokenizer):
            raise record.error(
                f"input_ids[{position}] is {token!r}; the tokenizer's ids are 0 to {len(tokenizer) - 1}"
            )
        if flag not in (0, 1):
            raise record.error(f"loss_mask[{position}] is {flag!r}; write 0 or 1")
    return tokens, [bool(flag) for flag in mask]


def _text(record: Record, key: str) -> str:
    value = record.fields[key]
    if not isinstance(value, str):
        raise record.error(f'"{key}" is {value!r:.60}; it must be a string, such as "95"')
    return value


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key}"' for key in sorted(keys)) or "(none)"
