"""Conversations to tokens by the tokenizer's chat template, and which of them the assistant wrote.

Templates with a ``{% generation %}`` block say it themselves. For the others it follows from prefixes:
the tokens of turns 0..i-1 with the generation prompt are what the policy is given, and the tokens of
turns 0..i continue them with what it must write. That holds only while each of these is a prefix of the
next; a template that rewrites earlier turns (dropping old reasoning, say) breaks it and is refused,
because training would then be on text that the policy never sees or writes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtrl.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def checked_messages(record: Record) -> Sequence[Message]:
    """Return the record's ``messages`` after checking that each has a role and a text."""
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise record.error(
            '"messages" must be a list of {"role": ..., "content": ...} with at least one turn'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise record.error(f'messages[{number}] must be an object with a "role" such as "user"')
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise record.error(f'messages[{number}] must have a "content" string; only text is supported')
    return messages


def render(
    record: Record, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerFast", *, for_generation: bool
) -> str:
    """Return the conversation as the chat template writes it, with the generation prompt if asked for."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise record.error('the tokenizer has no chat_template; use {"prompt", "completion"} records instead')
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=for_generation
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise record.error(f"the chat template refuses these messages: {error}") from error
    return str(text)


def conversation_tokens(
    record: Record, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerFast"
) -> tuple[list[int], list[bool]]:
    """Return the tokens of the conversation and, for each, whether the assistant wrote it.

    The end-of-turn token counts as the assistant's; white space that the template puts after it does not.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise record.error(
            'no message has the role "assistant", so there is nothing to train on; add its reply'
        )
    text = render(record, messages, tokenizer, for_generation=False)
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        return _tokens_by_generation_block(messages, tokenizer)
    tokens = _encode(text, tokenizer)
    mask = [False] * len(tokens)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            for position in _assistant_span(record, messages, turn, tokens, tokenizer):
                mask[position] = True
    return tokens, mask


def _tokens_by_generation_block(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerFast"
) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _assistant_span(
    record: Record,
    messages: Sequence[Message],
    turn: int,
    tokens: list[int],
    tokenizer: "PreTrainedTokenizerFast",
) -> range:
    """Positions in ``tokens`` of what the assistant wrote in this turn; refuses where prefixes disagree."""
    if turn == 0:
        raise record.error("messages[0] is the assistant's; a conversation must begin with another role")
    before = _encode(render(record, messages[:turn], tokenizer, for_generation=True), tokenizer)
    through = _encode(render(record, messages[: turn + 1], tokenizer, for_generation=False), tokenizer)
    if through[: len(before)] != before or tokens[: len(through)] != through:
        raise record.error(
            f"the chat template writes the turns up to messages[{turn}] differently when later turns follow, "
            "so the assistant's tokens cannot be told apart; mark them with a {% generation %} block in the "
            'template, train on one exchange a record, or use {"prompt", "completion"} records'
        )
    end = len(through)
    specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    while end > len(before) and not tokenizer.decode([tokens[end - 1]]).strip():
        end -= 1
    ends_turn = end > len(before) and tokens[end - 1] in specials
    return range(len(before), end if ends_turn else len(through))


def _encode(text: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    # The template has written the special tokens already.
    return list(tokenizer.encode(text, add_special_tokens=False))
