"""The repository root is the package `kit`: its folders become `kit.convert`, `kit.kernels` and so on."""

from setuptools import find_packages, setup

subpackages = find_packages(include=["convert*", "kernels*", "recipes*", "modules*"])

setup(
    package_dir={"kit": "."},
    packages=["kit", "kit.configs", *(f"kit.{name}" for name in subpackages)],
)
