"""A GRPO step of mtrl beside one of TRL, on the same model, prompts and machine; two CPU cores.

TRL lives in an environment of its own. Make it once, then measure::

    python -m venv .venv-trl && .venv-trl/bin/pip install "torch==2.13.0+cpu" "trl==1.16.*" \\
        "transformers==5.19.0" accelerate datasets
    .venv/bin/python -m mtrl.tools.bench.grpo_step --trl .venv-trl/bin/python

(Where no ``+cpu`` wheel is found, add PyTorch's CPU index as ``scripts/setup_env.sh`` does.) Every
measurement is a fresh process; configurations alternate, so that a busy spell of the machine meets all of
them. Writes ``docs/benchmarks/grpo_step.json`` and ``docs/benchmarks.md``.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrl.tools.bench import page

CONFIG = Path(__file__).with_suffix(".yaml")
NUM_PROMPTS, NUM_SAMPLES, NUM_LAYERS, LR, SEED = 8, 8, 4, 1e-3, 1
CONFIGURATIONS = ("trl, 1 process of 2 threads", "trl, 2 processes", "mtrl")


def make_inputs(folder: Path) -> None:
    """Write the prompts, and a model with random weights and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mtrl.data.arithmetic import make_arithmetic

    task = make_arithmetic(folder / "task", seed=SEED)
    lines = task.train.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:NUM_PROMPTS]), encoding="utf-8")
    config = AutoConfig.from_pretrained(page.ROOT / "configs" / "quickstart_model")
    config.num_hidden_layers = config.max_window_layers = NUM_LAYERS
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(task.tokenizer).save_pretrained(folder / "model")


def command(name: str, out: Path, folder: Path, num_tokens: int, given: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    module = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    two = [*module, "--nproc-per-node", "2"]
    model, prompts = folder / "model", folder / "prompts.jsonl"
    if name == "mtrl":
        overrides = [
            f"output_dir={out}.run", f"model.path={model}", f"data.train={prompts}",
            f"rollout.max_new_tokens={num_tokens}", f"algorithm.total_steps={given.steps}",
            f"actor.optimizer.lr={LR}", f"rollout.n_samples={NUM_SAMPLES}", f"seed={SEED}",
            f"algorithm.prompts_per_step={NUM_PROMPTS}",
        ]  # fmt: skip
        return [sys.executable, *two, "-m", "mtrl.tools.bench.mtrl_grpo", str(out), str(CONFIG), *overrides]
    is_alone = "1 process" in name
    script = str(Path(__file__).with_name("trl_grpo.py"))
    return [
        given.trl, *([] if is_alone else two), script, str(out),
        "--model", str(model), "--prompts", str(prompts), "--steps", str(given.steps),
        "--new-tokens", str(num_tokens), "--num-prompts", str(NUM_PROMPTS), "--num-samples", str(NUM_SAMPLES),
        "--lr", str(LR), "--seed", str(SEED),
        "--threads", "2" if is_alone else "1",
    ]  # fmt: skip


def environment(name: str) -> dict[str, str]:
    """This process's environment with the run's threads; offline, loopback only."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or name == "mtrl"}
    return kept | {
        "OMP_NUM_THREADS": "2" if "2 threads" in name else "1", "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), "VLLM_HOST_IP": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip


def measure(
    name: str, number: int, folder: Path, num_tokens: int, given: argparse.Namespace
) -> dict[str, Any]:
    """Run one configuration once: rank 0's wall seconds and parts, CPU seconds summed over processes."""
    out = folder / f"{name.replace(' ', '_').replace(',', '')}.{num_tokens}.{number}"
    load_before = os.getloadavg()[0]
    done = subprocess.run(
        command(name, out, folder, num_tokens, given), env=environment(name), cwd=page.ROOT,
        capture_output=True, text=True, timeout=given.timeout_s, check=False,
    )  # fmt: skip
    files = sorted(folder.glob(f"{out.name}.[0-9].json"))
    if done.returncode != 0 or not files:
        raise SystemExit(
            f"{name} failed at {num_tokens} tokens:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
        )
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for record in records:
        if set(record["lengths"]) != {float(num_tokens)}:
            raise SystemExit(f"{name}: completions have {set(record['lengths'])} tokens, not {num_tokens}")
    cpu_s = [sum(each) for each in zip(*(record["cpu_s"] for record in records), strict=True)]
    return {
        "name": name, "round": number, "num_tokens": num_tokens, "load_before": load_before,
        **records[0], "cpu_s": cpu_s,
    }  # fmt: skip


def about(given: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to repeat the measurement."""
    names = ["torch", "transformers", "trl"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    theirs = json.loads(subprocess.check_output([given.trl, "-c", code], text=True))
    ours = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    ours |= {"vllm": _vllm_version()}
    git = ["git", "-C", str(page.ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True).strip()
    return {
        "command": f"`python -m mtrl.tools.bench.grpo_step --rounds {given.rounds} --steps {given.steps}`",
        "commit": commit + (" and uncommitted changes" if changed else ""),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        "scheduling": _scheduling(),
        "Python": platform.python_version(),
        "mtrl's packages": _listed(ours),
        "TRL's packages": _listed(theirs),
    }


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _scheduling() -> str:
    """How this process and those it starts share the cores with whatever else runs."""
    policy = os.sched_getscheduler(0)
    names = {os.SCHED_OTHER: "the usual", os.SCHED_FIFO: "real time (SCHED_FIFO)"}
    priority = f"{names.get(policy, str(policy))}, nice {os.getpriority(os.PRIO_PROCESS, 0)}"
    return f"{priority}; the 1-minute load average before each run is in the numbers"


def _vllm_version() -> str:
    from mtrl.rollout.vllm_process import check_version

    return check_version()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def setting(given: argparse.Namespace) -> dict[str, Any]:
    """The setting of the measurement, for the page."""
    from mtrl.config_load import load_config

    config = load_config(CONFIG, [])
    return {
        "num_prompts": NUM_PROMPTS, "num_samples": NUM_SAMPLES, "num_layers": NUM_LAYERS, "hidden_size": 128,
        "num_experts": 8, "lengths": given.tokens, "num_rounds": given.rounds, "num_steps": given.steps,
        "num_warm": given.warm, "actor": config.actor.backend, "rollout": config.rollout.backend,
    }  # fmt: skip


def main() -> None:
    """Measure, write the numbers and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl", required=True, help="python of the environment that has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2, help="first steps of each run that are not counted")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one run")
    parser.add_argument("--out", type=Path, default=page.NUMBERS, help="folder for the numbers")
    given = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for number in range(given.rounds):
            for num_tokens in given.tokens:
                for configuration in CONFIGURATIONS:
                    run = measure(configuration, number, folder, num_tokens, given)
                    runs.append(run)
                    seconds = page.step_s(run, given.warm)
                    print(
                        f"round {number} {num_tokens:4d} tokens {configuration:28s} {seconds:.3f} s",
                        flush=True,
                    )
    numbers = {"setting": setting(given), "about": about(given), "runs": runs}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "grpo_step.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if given.out == page.NUMBERS:
        page.write()
    print(page.render(numbers))


if __name__ == "__main__":
    main()
