import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtrl.data import load_prompts, load_samples
from mtrl.parallel.errors import DataError

TURN = "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for message in messages %}" + TURN + "{% endfor %}" + PROMPT
CHATML_WITH_BLOCK = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + PROMPT
)
# As Qwen3's: an empty thought stands before the last reply only.
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
)
STRICT = "{{ raise_exception('roles must alternate') }}"

TWO_EXCHANGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, record: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return path


def trained_runs(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The trained stretches of the one sample, as text."""
    (sample,) = load_samples(path, tokenizer, max_length=1000)
    runs: list[list[int]] = [[]]
    for token, flag in zip(sample.tokens, sample.loss_mask, strict=True):
        if flag:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BLOCK])
def test_only_what_the_assistant_writes_is_trained_on(tmp_path: Path, template: str) -> None:
    path = write(tmp_path, {"messages": TWO_EXCHANGES})
    assert trained_runs(path, tokenizer_with(template)) == ["Hi.<|im_end|>", "See you.<|im_end|>"]


def test_prefixes_and_a_generation_block_agree_on_every_token(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TWO_EXCHANGES})
    by_prefix, by_block = (
        load_samples(path, tokenizer_with(template), max_length=1000)
        for template in (CHATML, CHATML_WITH_BLOCK)
    )
    assert by_prefix == by_block


def test_the_prompt_of_a_conversation_is_what_sft_puts_before_the_reply(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    record = {"messages": TWO_EXCHANGES[:2], "answer": "Hi."}
    (prompt,) = load_prompts(write(tmp_path, record), tokenizer, max_prompt_length=1000)
    (sample,) = load_samples(write(tmp_path, {"messages": TWO_EXCHANGES[:3]}), tokenizer, max_length=1000)
    assert prompt.text.endswith("<|im_start|>assistant\n") and prompt.answer == "Hi."
    assert prompt.tokens == sample.tokens[: sample.loss_mask.index(True)]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TWO_EXCHANGES})
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*up to messages\[2\] differently .*generation"):
        load_samples(path, tokenizer_with(REWRITING), max_length=1000)


def test_a_template_that_writes_only_the_last_turn_otherwise_serves_one_exchange(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TWO_EXCHANGES[:3]})
    assert trained_runs(path, tokenizer_with(REWRITING)) == ["<think></think>Hi.<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ([], CHATML, '"messages" must be a list'),
        ("hello", CHATML, '"messages" must be a list'),
        ([{"content": "x"}], CHATML, r"messages\[0\] must be an object with a \"role\""),
        ([{"role": "user", "content": [1]}], CHATML, r"messages\[0\] must have a \"content\" string"),
        (TWO_EXCHANGES[:2], CHATML, 'no message has the role "assistant"'),
        (TWO_EXCHANGES[2:], CHATML, r"messages\[0\] is the assistant's"),
        (TWO_EXCHANGES, None, "the tokenizer has no chat_template"),
        (TWO_EXCHANGES, STRICT, "the chat template refuses these messages: roles must alternate"),
    ],
)
def test_bad_messages_are_refused_with_file_line_and_fix(
    tmp_path: Path, messages: Any, template: str | None, reason: str
) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*" + reason):
        load_samples(write(tmp_path, {"messages": messages}), tokenizer_with(template), max_length=1000)


def test_rl_messages_that_end_with_the_reply_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TWO_EXCHANGES[:3]})
    with pytest.raises(DataError, match=r"data\.jsonl:1: the last message is the assistant's"):
        load_prompts(path, tokenizer_with(CHATML), max_prompt_length=1000)
