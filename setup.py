"""Package metadata of mtrl; settings of the tools are in pyproject.toml.

``mtrl/parallel``, ``mtrl/models`` and ``mtrl/tools`` are symlinks to the folders beside this file, and
``find_packages`` follows them: what is installed is one package, ``mtrl`` (docs/decisions/0002).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "mtrl/__init__.py").read_text(), re.M)
README = HERE / "README.md"
assert VERSION is not None, "mtrl/__init__.py states __version__"

REQUIRED = [
    # 0.16.1 is the last Megatron-Core for Python 3.11.
    'megatron-core==0.16.1; python_version < "3.12"',
    'megatron-core>=0.19.2,<0.20; python_version >= "3.12"',
    "torch>=2.13,<2.14",
    "transformers>=5.16.1,<5.20",
    "safetensors>=0.6.2",
    "tokenizers>=0.23",
    "numpy",
    "omegaconf>=2.3",
    "rich>=13",
    "tensorboard>=2.17",
    "matplotlib>=3.9",
]
EXTRAS = {
    "cuda": [
        # The engine's private interfaces are used and tested at this version only.
        "vllm==0.32.0",
        "fla-core>=0.6,<0.7",  # one kernel of its: mtrl/logprobs.py
    ],
    # Compiles its torch part against the torch that is there: pip install --no-build-isolation '.[te]'.
    "te": ["transformer_engine[core_cu13,pytorch]==2.19.0"],
    "datasets": ["datasets>=4"],
    "dev": [
        "datasets>=4",
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "jsonschema",
        "psutil",  # what Megatron-Core 0.19 saves torch_dist checkpoints with
        "mypy",
        "ruff",
        "setuptools>=77",
    ],
}

setup(
    name="mtrl",
    version=VERSION[1],
    description="Reinforcement learning of mixture-of-experts language models on Megatron-Core and vLLM",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mtrl", "mtrl.*"]),
    package_data={"mtrl": ["py.typed"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
