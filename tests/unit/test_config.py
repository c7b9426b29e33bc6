import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.advantages import AdvantageKind
from mtrl.config import Config
from mtrl.config_engines import RolloutSection
from mtrl.config_load import load_config
from mtrl.config_types import Section, hints, matches, section_of, sections
from mtrl.data.load import Overlong
from mtrl.parallel.errors import ConfigError
from mtrl.progress import ProgressMode
from mtrl.tools import config_reference

ROOT = Path(__file__).resolve().parents[2]
GRPO = """\
output_dir: runs/x
algorithm: {name: grpo, total_steps: 60, prompts_per_step: 16, max_tokens_per_microbatch: 4096}
model: {path: /models/m}
actor:
  backend: "megatron:(attn:d2|ffn:e2)"
  optimizer: {lr: 1.0e-6}
rollout:
  backend: "vllm:d2"
data: {train: train.jsonl, eval: eval.jsonl}
reward: {name: exact_match}
"""
SFT = """\
output_dir: runs/x
algorithm: {name: sft, total_steps: 60, samples_per_step: 16, max_tokens_per_microbatch: 4096}
model: {init: configs/m.json}
actor: {backend: "megatron:d2", optimizer: {lr: 1.0e-6}}
data: {train: train.jsonl}
"""


def load(tmp_path: Path, *overrides: str, text: str = GRPO) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, *overrides: str, text: str = GRPO) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text)
    return str(caught.value)


# ---- loading ----


def test_the_file_gives_values_and_the_tree_gives_the_rest(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.rollout.backend == "vllm:d2" and config.rollout.n_samples == 8
    assert config.algorithm.warm_start is None


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(tmp_path: Path) -> None:
    config = load(tmp_path, "algorithm.total_steps=7", "rollout.n_samples=3", "rollout.n_samples=16")
    assert config.algorithm.total_steps == 7 and config.rollout.n_samples == 16


def test_an_override_reaches_into_a_section_that_is_null_by_default(tmp_path: Path) -> None:
    overrides = [f"algorithm.warm_start.{part}" for part in ("total_steps=5", "samples_per_step=4")]
    warm_start = load(tmp_path, *overrides, "algorithm.warm_start.learning_rate=1e-3").algorithm.warm_start
    assert warm_start is not None and warm_start.learning_rate == 1e-3


def test_a_spec_string_needs_no_quoting_beyond_the_shell(tmp_path: Path) -> None:
    text = "megatron[actor]:(attn:d4p2t2c2|ffn:d2p2t4e2)"
    assert load(tmp_path, f"actor.backend={text}").actor.backend == text


def test_off_needs_no_quotes(tmp_path: Path) -> None:
    assert load(tmp_path, "rollout.verify=off").rollout.verify == "off"
    assert load(tmp_path, text=GRPO.replace('vllm:d2"', 'vllm:d2"\n  verify: off')).rollout.verify == "off"
    assert "needs checksum or logits or off" in refusal(tmp_path, "rollout.verify=on")


def test_an_interpolation_names_any_key_even_one_left_at_its_default(tmp_path: Path) -> None:
    config = load(tmp_path, "seed=${rollout.n_samples}", "data.warm_start=${data.train}")
    assert config.seed == 8 and config.data.warm_start == "train.jsonl"


def test_an_integer_becomes_a_float_where_a_number_is_asked(tmp_path: Path) -> None:
    temperature = load(tmp_path, "rollout.temperature=2").rollout.temperature
    assert temperature == 2.0 and isinstance(temperature, float)


@pytest.mark.parametrize("text", [GRPO, SFT])
def test_the_written_yaml_reads_back_to_an_equal_config(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, "seed=3", "actor.optimizer.eps=1e-8", text=text)
    assert load(tmp_path, text=config.to_yaml()) == config


def test_every_config_of_the_repository_loads() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert {"grpo_qwen3_30b_a3b.yaml", "sft_qwen3_moe.yaml"} <= {path.name for path in paths}
    for path in paths:
        load_config(path)


def test_the_config_imports_neither_torch_nor_megatron_nor_vllm() -> None:
    code = (
        "import sys, mtrl.config, mtrl.config_load, mtrl.config_check\n"
        "print(sorted({'torch', 'megatron', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- refusals while loading: where, what was given, what is needed ----

UNREADABLE = {
    "rollout.n_sample=1": "section 'rollout' has no key 'n_sample'; did you mean 'rollout.n_samples'?",
    "n_samples=1": "command line: the top level has no key 'n_samples'; did you mean 'rollout.n_samples'?",
    "actor.lr=1": "section 'actor' has no key 'lr'; did you mean 'actor.optimizer.lr'?",
    "data.xyz=1": "section 'data' has no key 'xyz'; its keys are train, eval, warm_start,",
    "seed=one": "command line: seed: given 'one' (str), needs an integer, at least 0",
    "seed=-1": "seed: given -1 (int), needs an integer, at least 0",
    "seed=true": "seed: given True (bool), needs an integer",
    "rollout.n_samples=1e2": "rollout.n_samples: given 100.0 (float), needs an integer",
    "rollout.top_p=0": "rollout.top_p: given 0 (int), needs a number, above 0 and at most 1",
    "rollout.temperature=.nan": "rollout.temperature: given nan (float), needs a number, above 0",
    "model.precision=fp16": "model.precision: given 'fp16' (str), needs fp32 or bf16 or fp8_blockwise",
    "logging.tensorboard=1": "logging.tensorboard: given 1 (int), needs true or false",
    "actor.sequence_parallel=maybe": "needs true or false, or auto",
    "output_dir=7": "output_dir: given 7 (int), needs text",
    "data.train=": "data.train: given null, needs text",
    "rollout=null": "rollout: given null, needs a section of keys",
    "algorithm.warm_start=3": "algorithm.warm_start: given 3 (int), needs a section of keys, or null",
    "algorithm.warm_start.learning_rate=1": "algorithm.warm_start.total_steps: missing, needs an integer",
    "data.train=${nope}": "Interpolation key 'nope' not found",
    "data.train=???": "command line: data.train: '???' asks for a value",
    "data.train=[": "command line: the value of 'data.train=[' is not readable as YAML",
    "seed": "command line: 'seed' is no override; write section.key=value",
    "--seed=1": "command line: '--seed=1' is no override",
}


@pytest.mark.parametrize("override", UNREADABLE)
def test_a_bad_override_is_refused_with_what_is_needed(tmp_path: Path, override: str) -> None:
    assert UNREADABLE[override] in refusal(tmp_path, override)


def test_a_refusal_of_the_file_names_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, text=GRPO.replace('backend: "vllm:d2"', 'backnd: "vllm:d2"'))
    assert message.startswith(f"{tmp_path / 'c.yaml'}:8: ") and "did you mean 'rollout.backend'?" in message
    message = refusal(tmp_path, text=GRPO.replace("total_steps: 60", "total_steps: 0"))
    assert message.startswith(f"{tmp_path / 'c.yaml'}:2: algorithm.total_steps: given 0 (int)")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("output_dir", "output_dir: missing, needs text"),
        ("algorithm", "algorithm.name: missing, needs grpo or sft"),
        ("actor", "actor.backend: missing, needs text"),
        ("data", "data.train: missing, needs text"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, section: str, message: str) -> None:
    lines = [line for line in SFT.splitlines() if not line.startswith(f"{section}:")]
    assert refusal(tmp_path, text="\n".join(lines)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "needs keys such as 'algorithm:'"),
        ("seed: [\n", "not readable as YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("seed: ???\n", "'???' asks for a value"),
        ("", "missing, needs"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text=text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(tmp_path / "latin.yaml")


# ---- the tree ----


def test_every_default_is_what_its_field_allows(tmp_path: Path) -> None:
    config = load(tmp_path)
    for section in sections(Config):
        value: Any = config
        for part in filter(None, section.key.split(".")):
            value = getattr(value, part)
        if value is not None:
            assert all(matches(getattr(value, name), hint) for name, hint in hints(section).items())


def test_a_section_built_by_hand_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.n_samples: given 0 \(int\), needs an integer"):
        replace(load(tmp_path).rollout, n_samples=0)


def test_the_key_of_a_section_is_its_place_in_the_tree() -> None:
    def places(section: type[Section], prefix: str) -> None:
        assert section.key == prefix
        for name, hint in hints(section).items():
            below = [one for one in sections(Config) if one in (hint, *get_args(hint))]
            for one in below:
                places(one, f"{prefix}.{name}".lstrip("."))

    places(Config, "")


def test_choices_are_the_ones_that_the_code_behind_them_knows() -> None:
    tree = {section.key: hints(section) for section in sections(Config)}
    assert set(get_args(tree["algorithm"]["advantage"])) == set(get_args(AdvantageKind))
    assert set(get_args(tree["data"]["overlong"])) == set(get_args(Overlong))
    assert set(get_args(tree["logging"]["progress"])) == set(get_args(ProgressMode))


def test_every_value_has_a_text_and_the_reference_is_current() -> None:
    texts = config_reference.field_texts()
    for section in sections(Config):
        values = [spec.name for spec in fields(section)]  # type: ignore[arg-type]
        below = [name for name, hint in hints(section).items() if section_of(hint)]
        missing = set(values) - set(below) - set(texts[section])
        assert not missing, f"{section.key or 'top level'}: no text under {missing}"
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_reference.render(), "run python tools/config_reference.py"


def test_lengths_and_paths_that_are_null_follow_from_other_keys(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.max_prompt_length == 4096 - 1024 and config.eval_max_new_tokens == 1024
    assert load(tmp_path, "data.max_prompt_length=9").max_prompt_length == 9
    assert load(tmp_path, "evaluation.max_new_tokens=5").eval_max_new_tokens == 5
    assert config.tokenizer_path == Path("/models/m")
    assert load(tmp_path, text=SFT).tokenizer_path == Path("configs")
    assert load(tmp_path, "model.tokenizer=tok", text=SFT).tokenizer_path == Path("tok")


ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())


@settings(deadline=None)  # the law is about values; a busy machine is no counterexample
@given(value=ANYTHING)
def test_a_value_is_accepted_or_refused_with_what_it_was(value: object) -> None:
    for name, hint in hints(RolloutSection).items():
        change: dict[str, Any] = {name: value}
        if matches(value, hint):
            assert getattr(RolloutSection(**change), name) == value
        else:
            with pytest.raises(ConfigError, match=f"^rollout.{name}: given .*, needs "):
                RolloutSection(**change)
