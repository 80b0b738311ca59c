"""The wheel holds configs/ as ssl_jax/recipes/configs, which pyproject.toml cannot say: a top-level `configs` could be anyone's."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ssl_jax*"]), "ssl_jax.recipes.configs"],
    package_dir={"ssl_jax.recipes.configs": "configs"},
)
