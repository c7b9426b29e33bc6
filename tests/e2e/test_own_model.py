"""docs/own_model.md, run: its files are written as they stand there, its commands run in their order."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mtrl.tools import generate
from mtrl.train import main
from tests.distributed.world import World
from tests.e2e.jobs import ROOT, python, run_main
from tests.e2e.toy import MODEL

pytestmark = pytest.mark.vllm

TEXT = (ROOT / "docs" / "own_model.md").read_text()
FILES = {
    "data.jsonl": ("jsonl", 0), "sft.yaml": ("yaml", 0), "questions.jsonl": ("jsonl", 1),
    "my_rewards.py": ("python", 0), "grpo.yaml": ("yaml", 1),
}  # fmt: skip
# The model is small and there is no GPU: fewer steps, smaller steps, fp32.
SMALLER = {
    "sft.yaml": ["algorithm.total_steps=2", "algorithm.samples_per_step=3", "checkpoint.every_steps=1"],
    "grpo.yaml": [
        "algorithm.total_steps=2", "algorithm.prompts_per_step=2", "rollout.n_samples=2",
        "rollout.max_new_tokens=8", "rollout.kv_cache_bytes=8388608", "algorithm.max_k3_kl=1e-6",
    ],
}  # fmt: skip


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [body for each, body in found if each == language]


def shortened(text: str) -> str:
    """Paths of the last checkpoints, after so many steps as there are here."""
    return re.sub(r"step_000[23]00", "step_000002", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """The reader's folder: the files of the document, and a model that transformers wrote."""
    import transformers

    folder = tmp_path_factory.mktemp("own")
    for name, (language, number) in FILES.items():
        (folder / name).write_text(shortened(blocks(language)[number]))
    settings = {key: value for key, value in MODEL.items() if key != "architectures"}
    network = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    network.save_pretrained(folder / "my-model")
    shutil.copytree(toy / "task" / "tokenizer", folder / "my-model", dirs_exist_ok=True)
    return folder


def run(folder: Path, world: World, command: str) -> int:
    """The command's exit status; what starts many processes starts them cheaper than torchrun would."""
    program, *arguments = shlex.split(command.removeprefix("PYTHONPATH=. "))
    if "show_layout.py" in command:
        return python(folder, str(ROOT / arguments[0]), *arguments[1:]).status
    if "generate.py" in command:
        return generate.main([*arguments[1:], "--engine=transformers"])
    assert [program, *arguments[:3]] == ["torchrun", "--nproc-per-node", "2", "mtrl/train.py"]
    given = arguments[3:]
    given += [*SMALLER[given[0]], "model.precision=fp32", "logging.progress=none"]
    if "--dry-run" in given:
        return main(given)
    ranks = world.run(
        run_main, {"folder": str(folder), "arguments": given}, size=2, start=False, timeout_s=200
    )
    return max(rank["status"] for rank in ranks)


def test_the_walk_through_walks(folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    commands = [shortened(line) for block in blocks("") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        assert run(folder, world, command) == 0, command
    for name in ("my_sft", "my_grpo"):
        assert (folder / "runs" / name / "checkpoints" / "step_000002" / "model.safetensors").is_file()
