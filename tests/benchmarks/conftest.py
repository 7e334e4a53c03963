"""Benchmarks are scripts, no part of the package."""

import importlib
from pathlib import Path

import pytest

import kit


@pytest.fixture
def script(monkeypatch):
    """A function that imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(Path(kit.__file__).parent / "benchmarks"))
    return importlib.import_module
