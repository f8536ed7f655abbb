"""The packages. All else stands in pyproject.toml; the version in `kto_dist/__init__.py`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kto_dist", "kto_dist.*"]), "kto_kernels"],
    # a package called `kernels` would hide the one of that name on PyPI, which transformers imports
    package_dir={"kto_kernels": "kernels/kto_kernels"},
    package_data={"": ["py.typed", "*.j2", "*.yaml", "examples/*", "presets/*.yaml"]},
)
