"""The wheel holds the package, all of it, and nothing else, and works where it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kit

ROOT = Path(kit.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = tmp_path_factory.mktemp("source") / "kit"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "demo", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=skipped)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*pip, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("kit-*.whl"))


def test_the_wheel_lists_every_module_preset_and_template_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("kit/") for name in packaged)
    folders = ("convert", "kernels", "modules", "recipes", "configs")
    expected = {p.relative_to(ROOT) for folder in folders for p in (ROOT / folder).rglob("*.py")}
    expected |= {p.relative_to(ROOT) for kind in ("yaml", "json") for p in (ROOT / "configs").rglob(f"*.{kind}")}
    expected |= {p.relative_to(ROOT) for p in (ROOT / "convert").glob("*.jinja")}
    expected |= {Path("__init__.py"), Path("cli.py"), Path("families.py"), Path("py.typed")}
    assert packaged - {"kit/setup.py"} == {f"kit/{path}" for path in expected}


def test_the_installed_wheel_works(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import kit, kit.recipes; print(kit.__file__, *kit.recipes.presets())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.split()[0] == str(tmp_path / "kit" / "__init__.py"), done.stderr
    assert "lolcats" in done.stdout
    entry_points = next(tmp_path.glob("kit-*.dist-info/entry_points.txt")).read_text()
    assert "kit = kit.cli:main" in entry_points
