import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mtrl.data import load_prompts, load_samples
from mtrl.data.arithmetic import build_tokenizer
from mtrl.parallel.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def write(folder: Path, *records: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def test_a_datasets_folder_gives_what_the_same_records_in_jsonl_give(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [{"prompt": f"{number}=", "completion": str(number)} for number in range(5)]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "folder"))
    from_folder = load_samples(tmp_path / "folder", tokenizer, max_length=8)
    assert from_folder == load_samples(write(tmp_path, *records), tokenizer, max_length=8)


def test_rows_of_a_datasets_folder_may_be_of_different_kinds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "1=", "completion": "1"},
        {"input_ids": [1, 2], "loss_mask": [0, 1]},
    ]
    rows = [
        {key: one.get(key) for key in ("prompt", "completion", "input_ids", "loss_mask")} for one in records
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    assert [one.sample_id for one in load_samples(tmp_path / "folder", tokenizer, max_length=8)] == [0, 1]


def test_a_bad_row_of_a_datasets_folder_is_refused_with_its_number(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    datasets.Dataset.from_list([{"text": "1="}]).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(DataError, match=r'folder, row 0: has the keys "text"; RL needs'):
        load_prompts(tmp_path / "folder", tokenizer, max_prompt_length=8)


def test_a_folder_of_splits_is_refused_with_their_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    split = datasets.Dataset.from_list([{"prompt": "1="}])
    datasets.DatasetDict({"train": split, "dev": split}).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(
        DataError, match=r"holds splits \(dev, train\); name the folder of one, such as .*dev"
    ):
        load_prompts(tmp_path / "folder", tokenizer, max_prompt_length=8)
    assert len(load_prompts(tmp_path / "folder" / "train", tokenizer, max_prompt_length=8)) == 1


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"not a folder that Dataset\.save_to_disk wrote"):
        load_prompts(tmp_path, tokenizer, max_prompt_length=8)
