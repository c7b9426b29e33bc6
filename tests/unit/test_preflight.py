"""What is checked before a process group exists, on a job whose files are real: each refusal says the fix."""

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from mtrl.acceleration import this_machine
from mtrl.config import Config
from mtrl.config_load import load_config
from mtrl.parallel.errors import (
    ConfigError,
    DataError,
    LayoutError,
    MissingPackageError,
    ModelError,
    MtrlError,
    UnknownFamilyError,
    WeightError,
)
from mtrl.preflight import Job, prepare
from tests.e2e.toy import MODEL, NUM_EVAL, NUM_TRAIN, write_toy
from tests.toys import build_toy, write_weights

Refused = tuple[type[MtrlError], list[str], str]


@pytest.fixture(autouse=True)
def job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_toy(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.util.find_spec("vllm") is None:
        # Its presence is all that is checked here, and everything else can be checked without it.
        stand_in = ModuleType("vllm")
        stand_in.__spec__ = ModuleSpec("vllm", None)
        monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return tmp_path


def config(*overrides: str, name: str = "grpo") -> Config:
    return load_config(f"{name}.yaml", overrides)


def prepared(*overrides: str, name: str = "grpo", world_size: int = 2) -> Job:
    return prepare(config(*overrides, name=name), world_size)


def test_a_job_holds_what_its_files_hold() -> None:
    job = prepared()
    assert [len(each) for each in (job.train_prompts, job.warm_start_samples)] == [NUM_TRAIN, NUM_TRAIN]
    assert len(job.eval_prompts) == NUM_EVAL and job.train_samples == ()
    assert job.stop_token_ids == (2,) and job.pad_token_id == 0
    assert job.max_model_len == max(len(prompt.tokens) for prompt in job.train_prompts) + 6


def test_an_sft_job_samples_nothing() -> None:
    job = prepared(name="sft")
    assert len(job.train_samples) == NUM_TRAIN
    assert (job.train_prompts, job.rollout, job.reward, job.eval_reward) == ((), None, None, None)


def test_held_out_prompts_are_scored_as_they_are_in_the_control_run() -> None:
    job = prepared("reward.name=shuffled:exact_match", "rollout.n_samples=2")
    assert job.reward is not job.eval_reward


def test_only_the_first_held_out_prompts_are_read_when_so_many_are_asked_for() -> None:
    assert [prompt.prompt_id for prompt in prepared("evaluation.num_prompts=2").eval_prompts] == [0, 1]


REFUSED: dict[str, Refused] = {
    "top-p": (ConfigError, ["rollout.top_p=0.9"], "rollout.top_p: given 0.9, grpo needs 1"),
    "heads of the trainer": (
        LayoutError,
        ["actor.backend=megatron:t4", "rollout.backend=vllm:d4"],
        "megatron:t4: KV heads 2 cannot be split attn t4 ways; use 1, 2",
    ),
    "heads of the engine": (
        LayoutError,
        ["actor.backend=megatron:d4", "rollout.backend=vllm:t4"],
        "rollout.backend: t4 does not divide 4 attention heads and 2 KV heads; write vllm:d2t2",
    ),
    "experts": (
        LayoutError,
        ["actor.backend=megatron:(attn:d8|ffn:e8)", "rollout.backend=vllm:d8"],
        "experts 4 cannot be split ffn e8 ways",
    ),
    "layers": (LayoutError, ["actor.backend=megatron:p4", "rollout.backend=vllm:d4"], "2 layers"),
    "sequence parallelism alone": (
        ConfigError,
        ["actor.sequence_parallel=true"],
        "actor.sequence_parallel: true with megatron:d2e2, which has no tensor parallel ranks",
    ),
    "experts without sequence parallelism": (
        ConfigError,
        ["actor.sequence_parallel=false", "actor.backend=megatron:t2"],
        "actor.sequence_parallel: false with megatron:t2 and a mixture of experts",
    ),
    "a bias that is not there": (
        ConfigError,
        ["actor.router.bias_update_rate=0.001"],
        "bias_update_rate: given 0.001, but this model's routers have no selection bias; balance them with",
    ),
    "recomputing what is not there": (
        ConfigError,
        ["actor.recompute=selective", "actor.recompute_modules=[moe, mlp, mla_up_proj]"],
        "of which this model has no mlp, mla_up_proj; it has core_attn, moe, layernorm",
    ),
    "recomputing nothing": (
        ConfigError,
        ["actor.recompute=selective", "actor.recompute_modules=[]"],
        "actor.recompute_modules: given [], of which this model has no part; it has core_attn, moe",
    ),
    "no model": (ModelError, ["model.init=nowhere"], "no config.json at nowhere"),
    "no weights": (ModelError, ["model.init=null", "model.path=model"], "model.safetensors.index.json; give"),
    "no tokenizer": (ModelError, ["model.tokenizer=model"], "no tokenizer at model; set model.tokenizer"),
    "no such data": (DataError, ["data.train=nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
    "long prompt": (DataError, ["data.max_prompt_length=6"], "train.jsonl:1: is 7 tokens long, more than"),
    "reward": (ConfigError, ["reward.name=exact"], "there is no reward 'exact'; there are exact_match"),
    "reward module": (ConfigError, ["reward.name=nowhere:f"], "found with PYTHONPATH=."),
    "too long for the model": (
        LayoutError,
        ["algorithm.max_tokens_per_microbatch=128", "rollout.max_new_tokens=60"],
        "sequences of up to 67 tokens, but the model's max_position_embeddings is 64; lower rollout.max_new",
    ),
    "long answers in evaluation": (LayoutError, ["evaluation.max_new_tokens=60"], "sequences of up to 67"),
}


def test_routers_of_a_dense_model_are_refused(job_folder: Path) -> None:
    dense = {**MODEL, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (job_folder / "model" / "config.json").write_text(json.dumps(dense))
    overrides = ["actor.backend=megatron:d2", "actor.router.z_loss_coeff=0.001"]
    with pytest.raises(ConfigError, match=r"actor\.router: given for a dense model, which has no routers"):
        prepared(*overrides)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_numbers_and_fix(case: str) -> None:
    error, overrides, message = REFUSED[case]
    given = config(*overrides)
    world_size = {"t4": 4, "d4": 4, "p4": 4, "d8": 8}.get(given.actor.backend.split(":")[-1][:2], 2)
    world_size = 8 if "e8" in given.actor.backend else world_size
    with pytest.raises(error) as caught:
        prepare(given, world_size)
    assert message in str(caught.value)


def test_transformer_engine_is_refused_where_it_is_not(record_refusal: Callable[[str], None]) -> None:
    overrides = ["model.backend=transformer_engine", "model.precision=bf16", "algorithm.max_k3_kl=0.1"]
    obstacle = this_machine().obstacle("transformer_engine")
    if not obstacle:
        prepared(*overrides)
        return
    with pytest.raises(ConfigError) as told:
        prepared(*overrides)
    message = f"model.backend: transformer_engine, which cannot be had here: {obstacle}"
    assert message in str(told.value)
    record_refusal("model.backend transformer_engine")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1="', "train.jsonl:2: not JSON"),
        ('["1+1=", "2"]', "train.jsonl:2: holds an array"),
        ('{"prompt": 11, "answer": "2"}', 'train.jsonl:2: "prompt" is 11; it must be a string'),
        ('{"question": "1+1="}', 'train.jsonl:2: has the keys "question"; RL needs "prompt"'),
    ],
)
def test_unreadable_data_is_refused_with_file_and_line(job_folder: Path, line: str, message: str) -> None:
    train = job_folder / "task" / "train.jsonl"
    lines = train.read_text().splitlines()
    train.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError) as caught:
        prepared()
    assert message in str(caught.value)


def test_a_model_of_no_family_is_refused_with_those_there_are(job_folder: Path) -> None:
    (job_folder / "model" / "config.json").write_text(
        json.dumps(MODEL | {"architectures": ["GPT2LMHeadModel"]})
    )
    with pytest.raises(UnknownFamilyError, match=r"GPT2LMHeadModel.*Qwen3ForCausalLM, Qwen3MoeForCausalLM"):
        prepared()


def test_a_tokenizer_of_another_model_is_refused(job_folder: Path) -> None:
    (job_folder / "model" / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 16}))
    with pytest.raises(ModelError, match=r"has 32 tokens, the model's vocab_size is 16"):
        prepared()


def test_a_tokenizer_that_cannot_end_is_refused(job_folder: Path) -> None:
    path = job_folder / "task" / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
    with pytest.raises(ModelError, match="has no eos_token"):
        prepared()


def test_an_sft_sample_longer_than_the_model_is_refused_with_the_keys_that_help(job_folder: Path) -> None:
    sample = {"prompt": "1+1=", "completion": "2" * 70}
    (job_folder / "task" / "sft.jsonl").write_text(json.dumps(sample) + "\n")
    with pytest.raises(LayoutError, match=r"up to 76 tokens.*lower algorithm\.max_tokens_per_microbatch"):
        prepared("algorithm.max_tokens_per_microbatch=128", name="sft")


@pytest.fixture
def weights(job_folder: Path) -> Path:
    sizes = {key: MODEL[key] for key in ("vocab_size", "num_hidden_layers", "num_experts")}
    return write_weights(build_toy("moe", seed=1, **sizes), job_folder / "hf")


def from_weights() -> Job:
    return prepared("model.init=null", "model.path=hf", "model.tokenizer=task/tokenizer")


def test_a_folder_with_all_weights_is_taken(weights: Path) -> None:
    assert from_weights().model.num_layers == 2


def test_a_file_cut_short_is_refused(weights: Path) -> None:
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ModelError, match=r"model\.safetensors is no whole safetensors file: tensor .* ends at byte \d+"
    ):
        from_weights()


def test_a_file_of_something_else_is_refused(weights: Path) -> None:
    (weights / "model.safetensors").write_text("<html>sign in first</html>")
    with pytest.raises(ModelError, match=r"model\.safetensors is no whole safetensors file: its header has"):
        from_weights()


def test_a_missing_part_is_refused(weights: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        from_weights()


def test_weights_of_another_shape_are_refused_by_name(weights: Path) -> None:
    path = weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 8}))
    with pytest.raises(WeightError) as caught:
        from_weights()
    assert "missing: model.layers.0.mlp.experts.4.gate_proj.weight (48, 64)" in str(caught.value)


def test_without_vllm_grpo_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # how Python itself marks a module as not there
    with pytest.raises(
        MissingPackageError, match=r"vllm is not installed: grpo samples with it;.*pip install"
    ):
        prepared()
    assert prepared(name="sft").rollout is None


def test_nothing_is_started_and_no_engine_is_imported() -> None:
    import torch.distributed as dist

    before = sys.modules.get("vllm")
    prepared()
    assert not dist.is_initialized() and sys.modules.get("vllm") is before
