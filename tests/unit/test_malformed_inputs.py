"""Configs, tokenizers, data and a run's own records, damaged: each is refused as what it is, and by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mtrl.data.arithmetic import make_arithmetic
from mtrl.data.records import read_records
from mtrl.data.tokenizer import load_tokenizer
from mtrl.models.families import load_model_config
from mtrl.parallel.errors import DataError, ModelError, MtrlError
from mtrl.run_folder import read_lines
from tests.e2e.toy import MODEL

pytestmark = pytest.mark.one_stack

PICKLE = b"cos\nsystem\n(S'touch canary'\ntR."
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": "b',
    "zeros": bytes(100),
    "not UTF-8": b'{"a": "\xff"}\n',
    "a list": b"[1]\n",
    "a number": b"7\n",
    "a long number": b'{"a": ' + b"1" * 5000 + b"}\n",
    "deep": b"[" * 100_000 + b"\n",
    "a pickle": PICKLE,
}
KINDS: dict[str, Callable[[Path], object]] = {"folder": Path.mkdir, "pipe": os.mkfifo}


def given(folder: Path, name: str, what: str) -> Path:
    """A file of that name and damage, or what is no file in its place."""
    file = folder / name
    file.unlink(missing_ok=True)
    KINDS[what](file) if what in KINDS else file.write_bytes(TEXTS[what])
    return file


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickle would make its canary in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("what", [*TEXTS, *KINDS])
def test_a_damaged_config_is_a_model_error(tmp_path: Path, what: str) -> None:
    given(tmp_path, "config.json", what)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model_config(tmp_path)
    assert not Path("canary").exists()


@pytest.mark.parametrize("value", ["x", [], {}, None, 0, -1, 0.5, True, [None], {"rope_type": []}])
@pytest.mark.parametrize("key", MODEL)
def test_a_config_with_another_value_is_read_or_a_model_error(
    tmp_path: Path, key: str, value: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {key: value}))
    try:
        assert load_model_config(tmp_path).family == "qwen3_moe"
    except ModelError as error:
        assert str(error)


def test_a_name_on_the_hub_is_told_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"Nothing is downloaded; .* hf download org/name --local-dir org/name"
    ):
        load_model_config(Path("org/name"))
    for other in ("nowhere", "a/b/c", "/org/name", "org/na me"):
        with pytest.raises(ModelError, match=r"give a Hugging Face model folder$"):
            load_model_config(Path(other))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return make_arithmetic(tmp_path / "task", seed=1, num_eval=2).tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("what", [*TEXTS, "folder"])
def test_a_damaged_tokenizer_is_a_model_error_or_read_from_its_other_file(
    tokenizer: Path, name: str, what: str
) -> None:
    given(tokenizer, name, what)
    try:
        assert load_tokenizer(tokenizer).eos_token_id is not None
    except ModelError as error:
        assert str(tokenizer) in str(error)
    assert not Path("canary").exists()


def test_a_damaged_tokenizer_is_not_read(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").write_bytes(TEXTS["cut"])
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tokenizer)


@pytest.mark.parametrize("what", [*TEXTS, *KINDS])
def test_a_damaged_data_file_is_a_data_error(tmp_path: Path, what: str) -> None:
    file = given(tmp_path, "data.jsonl", what)
    with pytest.raises(DataError, match=r"data\.jsonl"):
        list(read_records(file))
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("what", [*TEXTS])
def test_a_damaged_folder_of_data_is_an_mtrl_error_or_read_whole(
    tmp_path: Path, name: str, what: str
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["1+1="]}).save_to_disk(tmp_path / "data")
    given(tmp_path / "data", name, what)
    try:
        assert [record.fields["prompt"] for record in read_records(tmp_path / "data")] == ["1+1="]
    except MtrlError as error:
        assert "data" in str(error)
    assert not Path("canary").exists()


@pytest.mark.parametrize("what", [name for name in TEXTS if name not in ("empty", "cut", "zeros")])
def test_a_damaged_line_of_metrics_is_a_data_error(tmp_path: Path, what: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + TEXTS[what] + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl.* it was damaged"):
        read_lines(file)
    assert not Path("canary").exists()


def test_a_folder_in_place_of_metrics_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(tmp_path)
