"""Packaging of megatron_hc. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_hc" / "__init__.py").read_text()).group(1)

EXTRAS = {
    "hf": ["transformers>=5.0", "tokenizers", "tiktoken"],
    "data": ["datasets>=5.0", "zstandard", "pyarrow"],
    "eval": ["lm-eval==0.4.13"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client"],
    "log": ["tensorboard", "wandb", "matplotlib"],
    "plot": ["matplotlib"],
    "deepspeed": ["deepspeed>=0.19"],
    "te": ["transformer-engine[pytorch]>=2.0"],
    # NVIDIA's apex is on no index: PyPI's package of that name is another project.
    "fp8": ["torchao>=0.18"],
    "dev": [
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "megatron-core==0.16.1",
        "hyper-connections==0.4.11",
        "tensorboard",
        "matplotlib",
        "datasets>=5.0",
        "accelerate",
        "deepspeed>=0.19",
        "fastapi>=0.115",
        "httpx",
        "lm-eval==0.4.13",
        "openai",
        "prometheus-client",
        "pyarrow",
        "tiktoken",
        "tokenizers",
        "torchao>=0.18",
        "transformers>=5.0",
        # Its kernels run in its interpreter and are compiled without a GPU; torch's CPU build does not bring it.
        "triton>=3.6; platform_system == 'Linux'",
        "uvicorn>=0.30",
        "zstandard",
    ],
}

setup(
    name="megatron_hc",
    version=VERSION,
    description="Megatron-style pretraining of GPT and MoE models in which the residual path is a part you choose",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_hc", "megatron_hc.*"]),
    package_data={"megatron_hc": ["py.typed", "kernels/*.cpp"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "numpy",
        "packaging",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tqdm",
    ],
    extras_require=EXTRAS,
)
