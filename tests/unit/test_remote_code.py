"""Python code in a model folder runs only when ``model.trust_remote_code`` asks for it."""

import json
import sys
from pathlib import Path

import pytest

from mtrl.models.families import load_model_config
from tests.e2e.toy import MODEL
from tests.unit.test_preflight import job_folder, prepared  # noqa: F401  the fixture is used by name

pytestmark = [pytest.mark.one_stack, pytest.mark.usefixtures("job_folder")]

CODE = """\
from pathlib import Path
Path({canary!r}).touch()
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class Given(PreTrainedConfig):
    model_type = "given"
class GivenTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "code.Given", "AutoModelForCausalLM": "code.Given"}
AUTO_TOKENIZER = {"AutoTokenizer": ["code.GivenTokenizer", "code.GivenTokenizer"]}


def model_with_code(**settings: object) -> Path:
    """The toy's model config in a folder with code, which every entry of ``auto_map`` names."""
    folder = Path("given")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL | {"auto_map": AUTO_MAP} | settings))
    (folder / "code.py").write_text(CODE.format(canary=str(Path("canary").resolve())))
    return folder


def tokenizer_with_code(name: str) -> Path:
    """The toy's tokenizer in that folder, as a class of that name."""
    folder = model_with_code()
    for file in Path("task/tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": name, "auto_map": AUTO_TOKENIZER}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ran() -> bool:
    return Path("canary").exists()


def test_a_config_that_names_code_is_read_without_it() -> None:
    assert load_model_config(model_with_code()).family == "qwen3_moe"
    assert prepared("model.init=given").model.num_layers == MODEL["num_hidden_layers"]
    assert not ran()


def test_a_config_whose_kind_only_its_code_knows_is_read_without_it() -> None:
    # As Kimi-K2's, whose architecture is DeepSeek-V3's and whose model_type transformers does not know.
    assert load_model_config(model_with_code(model_type="given")).family == "qwen3_moe"
    assert prepared("model.init=given").model.num_layers == MODEL["num_hidden_layers"]
    assert not ran()


def test_a_tokenizer_of_a_known_class_is_loaded_without_its_code() -> None:
    tokenizer_with_code("PreTrainedTokenizerFast")
    assert prepared("model.tokenizer=given").stop_token_ids == (2,)
    assert not ran()


def test_a_tokenizer_that_is_code_is_refused_before_launch_and_not_run() -> None:
    tokenizer_with_code("GivenTokenizer")
    (Path("given") / "config.json").unlink()
    with pytest.raises(ValueError, match=r"trust_remote_code=[Tt]rue"):
        prepared("model.tokenizer=given")
    assert not ran()


def test_the_code_runs_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the tests above could pass on code that cannot run."""
    # transformers copies the code there and imports it as a part of `transformers_modules`.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tokenizer_with_code("GivenTokenizer")
    prepared("model.tokenizer=given", "model.trust_remote_code=true")
    assert ran()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["qwen3_moe", "given"])
def test_the_engine_reads_a_config_without_its_code(kind: str) -> None:
    from vllm.transformers_utils.config import get_config

    folder = model_with_code(model_type=kind)
    if kind == "given":
        with pytest.raises((RuntimeError, ValueError), match="trust_remote_code"):
            get_config(str(folder), trust_remote_code=False)
    else:
        assert get_config(str(folder), trust_remote_code=False).num_hidden_layers == 2
    assert not ran()
