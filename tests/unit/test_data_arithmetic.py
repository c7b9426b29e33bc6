import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtrl.data import load_prompts, load_samples
from mtrl.data.arithmetic import CHARACTERS, ArithmeticTask, build_tokenizer, make_arithmetic, split_pairs
from mtrl.parallel.errors import ConfigError, OutputExistsError


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ArithmeticTask:
    return make_arithmetic(tmp_path_factory.mktemp("arithmetic"), seed=1, num_eval=500)


@pytest.fixture(scope="module")
def tokenizer(task: ArithmeticTask) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(task.tokenizer), local_files_only=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# No deadline: each example splits all 8,100 pairs.
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(), num_eval=st.integers(1, 4094))
def test_no_held_out_sum_is_trained_on_either_way_round(seed: int, num_eval: int) -> None:
    train, held_out = split_pairs(seed, num_eval)
    trained = {frozenset(pair) for pair in train}
    assert len(held_out) == num_eval == len({frozenset(pair) for pair in held_out})
    assert trained.isdisjoint(frozenset(pair) for pair in held_out)
    assert len(trained) + num_eval == 90 * 91 // 2
    assert len(train) == len(set(train)) and set(train) == {(b, a) for a, b in train}


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path, task: ArithmeticTask) -> None:
    command = ["-m", "mtrl.data.arithmetic", "--out", str(tmp_path), "--seed", "1", "--num-eval", "500"]
    subprocess.run([sys.executable, *command], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    assert bytes_of(tmp_path) == bytes_of(task.train.parent)


def test_another_seed_holds_out_other_sums() -> None:
    assert set(split_pairs(1, 500)[1]) != set(split_pairs(2, 500)[1])


def test_every_answer_is_right_and_the_warm_up_has_the_prompts_of_training(task: ArithmeticTask) -> None:
    train, sft, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (task.train, task.sft, task.eval)
    )
    for record in train + held_out:
        left, right = record["prompt"].removesuffix("=").split("+")
        assert int(left) + int(right) == int(record["answer"])
    assert [(one["prompt"], one["answer"]) for one in train] == [
        (one["prompt"], one["completion"]) for one in sft
    ]
    assert (len(train), len(held_out)) == (task.num_train, task.num_eval)


def test_files_of_the_user_are_not_overwritten_and_equal_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text("mine\n")
    with pytest.raises(OutputExistsError, match=r"eval\.jsonl exists and holds something else"):
        make_arithmetic(tmp_path, seed=1)
    assert bytes_of(tmp_path) == {"eval.jsonl": b"mine\n"}
    (tmp_path / "eval.jsonl").unlink()
    assert make_arithmetic(tmp_path, seed=1) == make_arithmetic(tmp_path, seed=1)


@pytest.mark.parametrize("num_eval", [0, -1, 4095])
def test_holding_out_all_or_none_is_refused_with_the_bounds(tmp_path: Path, num_eval: int) -> None:
    with pytest.raises(ConfigError, match="hold out 1 to 4094"):
        make_arithmetic(tmp_path, seed=1, num_eval=num_eval)


@given(text=st.text(alphabet=CHARACTERS, max_size=40))
def test_decoding_undoes_encoding(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1 and len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_has_its_special_tokens_and_32_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 32
    assert tokenizer.unk_token_id in tokenizer.encode("a")


def test_beside_a_qwen3_moe_config_it_is_the_same_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # transformers prefers the model's own tokenizer class for some model types.
    tokenizer.save_pretrained(str(tmp_path))
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert again.encode("37+58=") == tokenizer.encode("37+58=")
    assert again.decode(again.encode("37+58=")) == "<bos>37+58="
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.vllm
def test_vllm_reads_the_tokenizer(task: ArithmeticTask) -> None:
    from vllm.tokenizers import get_tokenizer

    theirs = get_tokenizer(str(task.tokenizer))
    assert theirs.encode("37+58=") == build_tokenizer().encode("37+58=").ids
    assert theirs.decode([12, 9, 2], skip_special_tokens=True) == "85"


def test_all_files_load_as_prompts_and_samples(
    task: ArithmeticTask, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = load_prompts(task.train, tokenizer, max_prompt_length=7)
    samples = load_samples(task.sft, tokenizer, max_length=11)
    assert len(prompts) == len(samples) == task.num_train
    assert all(sample.tokens[:7] == prompt.tokens for sample, prompt in zip(samples, prompts, strict=True))
    assert len(load_prompts(task.eval, tokenizer, max_prompt_length=7)) == 500


def test_a_chat_about_it_reads_like_the_plain_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "37+58="}, {"role": "assistant", "content": "95"}]
    path.write_text(
        json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "37+58=", "completion": "95"})
    )
    chat, plain = load_samples(path, tokenizer, max_length=16)
    assert (chat.tokens, chat.loss_mask) == (plain.tokens, plain.loss_mask)
