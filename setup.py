from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="kto_dist",
    version="0.1.0",
    description="Kahneman-Tversky Optimization of language models from thumbs feedback, from one machine to a cluster",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["kto_dist", "kto_dist.*"]), "kto_kernels"],
    # a package called `kernels` would hide the one of that name on PyPI, which transformers imports
    package_dir={"kto_kernels": "kernels/kto_kernels"},
    package_data={"kto_dist": ["*.j2"], "kto_dist.feedback": ["*.j2"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.20,<6",
        "datasets>=5,<6",
        "pyarrow>=20",
        "fsspec>=2025.3",
        "mlflow>=3.10,<4",
        "pydantic>=2.10,<3",
        "PyYAML>=6",
        "click>=8.1",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "psutil>=6",
        "numpy>=2",
        "duckdb>=1.5,<3",
        "rensa>=0.5,<0.6",
        "py3langid>=0.4,<0.5",
        "scipy>=1.13",
    ],
    extras_require={
        "gguf": ["gguf>=0.17"],
        "s3": ["s3fs>=2025.3"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.14",
            'trl==1.16.0; python_version >= "3.11"',
            "gguf>=0.17",
            "peft>=0.17",
            "s3fs>=2025.3",
            "moto[s3]>=5.1",  # an S3 server for tests
        ],
    },
    entry_points={"console_scripts": ["kto-dist=kto_dist.cli:main"]},
)
