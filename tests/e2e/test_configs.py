"""Every config of the repository passes ``--dry-run`` at its own size, with stand-ins for its files."""

import json
from pathlib import Path

import pytest

from mtrl.config_load import load_config
from mtrl.parallel.spec import parse_training_spec
from mtrl.train import main
from tests.e2e.jobs import ROOT
from tests.e2e.toy import MODEL

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
QWEN3_30B_A3B = MODEL | {
    "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_theta": 1e6, "vocab_size": 151936,
}  # fmt: skip
"""The published sizes: the layouts of the node configs are checked against these."""


@pytest.mark.vllm
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_the_repository_is_ready_to_run(
    toy: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy)
    (toy / "30b.json").write_text(json.dumps(QWEN3_30B_A3B))
    given = load_config(ROOT / "configs" / name)
    model = ROOT / given.model.init if given.model.init else "30b.json"
    train = "task/sft.jsonl" if given.algorithm.name == "sft" else "task/train.jsonl"
    overrides = [
        "model.path=null",
        f"model.init={model}",
        "model.tokenizer=task/tokenizer",
        f"data.train={train}",
    ]
    overrides += ["data.eval=task/eval.jsonl"] if given.data.eval else []
    overrides += ["data.warm_start=task/sft.jsonl"] if given.data.warm_start else []
    world_size = parse_training_spec(given.actor.backend).world_size
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main([str(ROOT / "configs" / name), "--dry-run", *overrides]) == 0
    assert capsys.readouterr().out.endswith("fits qwen3_moe; nothing was started\n")
