"""Talking to a model: one folder, answered by vLLM, by transformers, and refused where it cannot be."""

import io
import re
import shutil
from pathlib import Path

import pytest

from mtrl.tools.generate import main
from tests.distributed.world import World
from tests.e2e.jobs import ROOT, forked, python
from tests.e2e.toy import MODEL
from tests.toys import build_toy, write_weights

PROMPTS = ("37+58=", "11+12=", "9")


@pytest.fixture(scope="module")
def model(toy: Path) -> Path:
    """A random model with the task's tokenizer, all of it in one folder."""
    names = ("vocab_size", "num_hidden_layers", "max_position_embeddings", "bos_token_id", "eos_token_id")
    folder = write_weights(build_toy("moe", seed=1, **{name: MODEL[name] for name in names}), toy / "random")
    shutil.copytree(toy / "task" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def greedy(folder: Path, text: str, max_new_tokens: int) -> str:
    """What transformers says without mtrl."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.encode(text)])
    output = network.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["a checkpoint of a run", "a random model"])
def test_vllm_answers_greedily_as_transformers_does(
    request: pytest.FixtureRequest, world: World, model: Path, kind: str
) -> None:
    folder = model if kind == "a random model" else request.getfixturevalue("checkpoint")
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    arguments = ("--model", str(folder), *asked, "--max-new-tokens", "12")
    if kind == "a random model":
        done = python(folder, str(ROOT / "tools" / "generate.py"), *arguments)
    else:
        done = forked(world, folder, "mtrl.tools.generate", *arguments)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [greedy(folder, prompt, 12) for prompt in PROMPTS]


def ask(model: Path, *arguments: str) -> int:
    return main(["--model", str(model), "--engine", "transformers", "--max-new-tokens", "12", *arguments])


def test_transformers_answers_each_line_and_goes_on_after_one_it_cannot(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n{'1' * 60}\n{PROMPTS[1]}\n"))
    assert ask(model) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [greedy(model, prompt, 12) for prompt in PROMPTS[:2]]
    assert "ConfigError: a prompt of 61 tokens and --max-new-tokens 12 make more than the 64" in err


def test_draws_follow_the_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seed in ("1", "1", "2"):
        assert ask(model, "--prompt", "1+1=", "--temperature", "1", "--seed", seed) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_a_chat_is_put_into_the_template(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The task's template writes a user's turn as the plain prompt.
    assert ask(model, "--prompt", "1+1=", "--chat") == ask(model, "--prompt", "1+1=") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "1" * 60], "ConfigError: a prompt of 61 tokens"),
        (["--prompt", "1", "--temperature=-1"], "ConfigError: --temperature is 0 (greedy) or more"),
        (["--model", "nowhere"], "ModelError: no folder nowhere; give a checkpoint"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert ask(model, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message)


def test_a_folder_without_tokenizer_or_weights_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing, message in (
        ("tokenizer*", "ModelError: .* has no tokenizer; copy"),
        ("model.safetensors", "ModelError: .* holds neither model.safetensors nor"),
    ):
        folder = tmp_path / missing.strip("*")
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns(missing))
        assert ask(folder, "--prompt", "1") == 1
        assert re.match(message, capsys.readouterr().err)


def test_without_vllm_it_names_the_other_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtrl.rollout.vllm_process._DISTRIBUTIONS", ())
    assert main(["--model", str(model), "--prompt", "1"]) == 1
    assert capsys.readouterr().err.endswith("; or add --engine transformers\n")
