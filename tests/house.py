"""What the house tests know about the repository: its files, their syntax trees, and the reading order."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"mtrl/parallel": "../parallel", "mtrl/models": "../models", "mtrl/tools": "../tools"}
PRODUCT = ("parallel/", "models/", "mtrl/", "tools/")

# Reading order is import order: a file imports only files that stand above it. Files of one folder that is
# listed as a whole may import each other, without cycles.
READING_ORDER = (
    "parallel/errors.py",
    "parallel/spec_grammar.py",
    "parallel/spec.py",
    "parallel/layout.py",
    "parallel/megatron_version.py",
    "parallel/device.py",
    "parallel/kernels.py",
    "parallel/capability_table.py",
    "parallel/capability_features.py",
    "parallel/capability_probe.py",
    "parallel/capabilities.py",
    "parallel/agreement.py",
    "parallel/quiet.py",
    "parallel/host.py",
    "parallel/megatron_mends.py",
    "parallel/megatron_ready.py",
    "parallel/determinism.py",
    "parallel/groups.py",
    "parallel/one_machine.py",
    "models/config.py",
    "models/safetensors_header.py",
    "models/hf_folder.py",
    "models/durable.py",
    "models/files.py",
    "models/boxes.py",
    "models/sources.py",
    "models/quantized.py",
    "models/carried.py",
    "models/stages.py",
    "models/roles.py",
    "models/families/",
    "models/weight_map.py",
    "models/flat_ranges.py",
    "models/pieces.py",
    "models/packed.py",
    "models/router.py",
    "models/megatron_config.py",
    "models/precision.py",
    "models/fp8_parameters.py",
    "models/backends/",
    "models/builder.py",
    "models/transfers.py",
    "models/gather.py",
    "models/hf.py",
    "mtrl/batch.py",
    "mtrl/config_types.py",
    "mtrl/config_acceleration.py",
    "mtrl/config_engines.py",
    "mtrl/config.py",
    "mtrl/config_load.py",
    "mtrl/config_check.py",
    "mtrl/model_settings.py",
    "mtrl/packing.py",
    "mtrl/exchange.py",
    "mtrl/advantages.py",
    "mtrl/losses.py",
    "mtrl/logprobs.py",
    "mtrl/policy.py",
    "mtrl/objectives.py",
    "mtrl/memory.py",
    "mtrl/adam.py",
    "mtrl/trainer.py",
    "mtrl/run_folder.py",
    "mtrl/metrics.py",
    "mtrl/progress.py",
    "mtrl/plots.py",
    "mtrl/data/",
    "mtrl/rewards/",
    "mtrl/rollout/",
    "mtrl/weight_push/",
    "mtrl/checkpoint/",
    "mtrl/overlap_rules.py",
    "mtrl/fp8_rules.py",
    "mtrl/acceleration.py",
    "mtrl/preflight.py",
    "mtrl/resume_check.py",
    "mtrl/resume.py",
    "mtrl/stop.py",
    "mtrl/session.py",
    "mtrl/sft.py",
    "mtrl/rl.py",
    "mtrl/probe.py",
    "mtrl/opening.py",
    "mtrl/run.py",
    "mtrl/last_words.py",
    "mtrl/train.py",
    "tools/",
)


@cache
def files() -> tuple[str, ...]:
    """Every file of the repository that is not ignored, from its root; symlinks are not followed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return tuple(sorted(path for path in set(listed) if (ROOT / path).exists()))


def python_files(*folders: str) -> list[str]:
    """Python files under ``folders`` (everywhere when none is named)."""
    return [path for path in files() if path.endswith(".py") and (not folders or path.startswith(folders))]


@cache
def tree_of(path: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse((ROOT / path).read_text(), path)


def module_of(path: str) -> str:
    """The import name of a product file: parallel/spec.py is mtrl.parallel.spec."""
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.split(".")[0] == "mtrl" else f"mtrl.{dotted}"


@cache
def path_of() -> dict[str, str]:
    """Import name to file, for all product files."""
    return {module_of(path): path for path in python_files(*PRODUCT)}


def imported_files(path: str) -> set[str]:
    """The product files that the statements of ``path`` import, functions' own imports included.

    ``from mtrl.rollout import seeds`` counts as the file of ``seeds``, not as the package's.
    """
    found = set()
    for node in ast.walk(tree_of(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in path_of() else node.module for name in submodules]
        found |= {path_of()[name] for name in names if name in path_of()}
    return found - {path}
