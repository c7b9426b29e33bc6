import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from mtrl.data import load_prompts, load_samples
from mtrl.data.arithmetic import build_tokenizer
from mtrl.parallel.errors import DataError, MissingPackageError, ModelError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def write(folder: Path, *records: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def test_a_completion_is_trained_on_with_its_eos_and_the_prompt_is_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, {"prompt": "37+58=", "completion": "95"})
    (sample,) = load_samples(path, tokenizer, max_length=16)
    assert tokenizer.decode(list(sample.tokens)) == "<bos>37+58=95<eos>"
    trained = [token for token, flag in zip(sample.tokens, sample.loss_mask, strict=True) if flag]
    assert tokenizer.decode(trained) == "95<eos>"


def test_a_prompt_has_the_tokens_that_sft_puts_before_the_completion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, {"prompt": "37+58=", "answer": "95", "completion": "95", "note": "left alone"})
    (sample,) = load_samples(path, tokenizer, max_length=16)
    (prompt,) = load_prompts(path, tokenizer, max_prompt_length=16)
    assert prompt.tokens == sample.tokens[: len(prompt.tokens)]
    assert sample.loss_mask == (False,) * len(prompt.tokens) + (True,) * 3
    assert (prompt.text, prompt.answer, prompt.prompt_id) == ("37+58=", "95", 0)


def test_a_tokenizer_that_ends_every_text_leaves_prompts_open(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    path = write(tmp_path, {"prompt": "a", "completion": "a"})
    assert load_prompts(path, tokenizer, max_prompt_length=8)[0].tokens == (0,)
    assert load_samples(path, tokenizer, max_length=8)[0].tokens == (0, 0, 1)


def test_given_tokens_come_back_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, {"input_ids": [1, 5, 6], "loss_mask": [0, 1, 0]})
    (sample,) = load_samples(path, tokenizer, max_length=3)
    assert (sample.tokens, sample.loss_mask) == ((1, 5, 6), (False, True, False))


def test_blank_lines_a_byte_order_mark_and_line_separators_in_strings_do_no_harm(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1="}\n\n{"prompt": "2=\xe2\x80\xa8"}\r\n')
    prompts = load_prompts(path, tokenizer, max_prompt_length=8)
    assert [(one.prompt_id, one.text) for one in prompts] == [(0, "1="), (1, "2=\u2028")]


SFT_REFUSALS = [
    ("not json", r"not JSON: .* at column 1; write one whole JSON object on each line"),
    ("[1]", r"holds an array; each line must be an object"),
    ("3", r"holds a number"),
    ("null", r"holds null"),
    ("[" * 100_000, r"nested too deeply"),
    ({}, r"has the keys \(none\); SFT needs"),
    (
        {"prompt": "1=", "answer": "1"},
        r'has the keys "answer", "prompt"; SFT needs "prompt" and "completion"',
    ),
    ({"prompt": "1=", "completion": 1}, r'"completion" is 1; it must be a string'),
    ({"input_ids": [1, 2], "loss_mask": [0]}, r"lists of one length"),
    ({"input_ids": [], "loss_mask": []}, r"at least 1"),
    ({"input_ids": [1, 32], "loss_mask": [0, 1]}, r"input_ids\[1\] is 32; the tokenizer's ids are 0 to 31"),
    ({"input_ids": [1, -1], "loss_mask": [0, 1]}, r"input_ids\[1\] is -1"),
    ({"input_ids": [1, True], "loss_mask": [0, 1]}, r"input_ids\[1\] is True"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, r"loss_mask\[1\] is 2; write 0 or 1"),
    ({"input_ids": [1, 2], "loss_mask": [1, 1]}, r"its loss_mask must be 0"),
    ({"input_ids": [1, 2], "loss_mask": [0, 0]}, r"no token is trained on"),
    ({"prompt": "1" * 40, "completion": "1"}, r"is 43 tokens long, more than max_length=16; raise it to 43"),
]


@pytest.mark.parametrize(("record", "reason"), SFT_REFUSALS, ids=lambda value: str(value)[:40])
def test_a_bad_record_is_refused_with_file_line_and_fix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, record: Any, reason: str
) -> None:
    path = write(tmp_path, {"prompt": "1=", "completion": "1"}, "", record)
    with pytest.raises(DataError, match=r"data\.jsonl:3: .*" + reason):
        load_samples(path, tokenizer, max_length=16)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"answer": "1"}, r'has the keys "answer"; RL needs "prompt" or "messages"'),
        ({"prompt": "1=", "answer": 1}, r'"answer" is 1; it must be a string'),
        ({"prompt": "1" * 20}, r"is 21 tokens long, more than max_prompt_length=16"),
    ],
)
def test_a_bad_prompt_is_refused_with_file_line_and_fix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, record: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*" + reason):
        load_prompts(write(tmp_path, record), tokenizer, max_prompt_length=16)


def test_bytes_that_are_not_utf8_are_refused_with_file_line_and_fix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "1="}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: byte 12 is not UTF-8; save the file as UTF-8"):
        load_prompts(path, tokenizer, max_prompt_length=8)


def test_a_missing_or_empty_file_is_refused_with_its_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file or folder"):
        load_prompts(tmp_path / "gone.jsonl", tokenizer, max_prompt_length=8)
    with pytest.raises(DataError, match=r"data\.jsonl: holds no records"):
        load_prompts(write(tmp_path), tokenizer, max_prompt_length=8)


def test_dropping_overlong_records_keeps_the_ids_of_the_others_and_tells_the_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"prompt": "1="}, {"prompt": "1" * 20}, {"prompt": "2="})
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(path, tokenizer, max_prompt_length=8, overlong="drop")
    assert [one.prompt_id for one in prompts] == [0, 2]
    assert "left out 1 of 3 records longer than max_prompt_length=8" in caplog.text
    with pytest.raises(DataError, match="all 3 records are longer than max_prompt_length=1"):
        load_prompts(path, tokenizer, max_prompt_length=1, overlong="drop")


def test_limit_keeps_the_first_prompts_and_reads_no_further(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, {"prompt": "1="}, {"prompt": "2="}, "not json")
    prompts = load_prompts(path, tokenizer, max_prompt_length=8, limit=2)
    assert [one.text for one in prompts] == ["1=", "2="]


def test_a_tokenizer_without_eos_is_refused_for_completions(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer())
    with pytest.raises(ModelError, match="no eos_token"):
        load_samples(write(tmp_path, {"prompt": "1=", "completion": "1"}), bare, max_length=8)


def test_a_datasets_folder_without_the_package_gives_the_install_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python itself does for a module that is None here is raise ImportError.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match="pip install datasets"):
        load_prompts(tmp_path, tokenizer, max_prompt_length=8)
