"""Packaging of lopd and lopd_kernels; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["transformers>=5.16,<6", "accelerate>=1.15", "tqdm>=4.66", "PyYAML>=6.0", "jinja2>=3.1"]
BENCH = ["matplotlib>=3.9"]
PARQUET = ["pyarrow>=18"]
PEFT = ["peft>=0.21"]
MATH = ["math-verify[antlr4_13_2]>=0.9,<0.10"]

setup(
    name="lopd",
    version="0.1.0",
    description="Offline on-policy distillation of LLMs with fused sparse-teacher losses",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["lopd", "lopd.*", "lopd_kernels", "lopd_kernels.*"]),
    package_data={"lopd": ["py.typed"], "lopd_kernels": ["py.typed"]},
    install_requires=["torch>=2.11", "numpy>=1.26", "safetensors>=0.5"],
    extras_require={
        "train": TRAIN,
        "vllm": ["vllm>=0.32,<0.34"],
        "eval": [*TRAIN, *MATH],
        "bench": BENCH,
        "parquet": PARQUET,
        "peft": PEFT,
        "test": [
            *TRAIN,
            *BENCH,
            "triton>=3.6; platform_system == 'Linux'",
            *PARQUET,
            *PEFT,
            *MATH,
            "trl>=1.16,<2",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["lopd = lopd.cli:main"]},
)
