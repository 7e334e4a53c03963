import ast
import importlib.util
import subprocess
import sys

import pytest

from kit.modules.bundler import bundle, flat_name


def test_every_import_of_ours_becomes_a_flat_relative_one_and_is_bundled():
    files = bundle("kit.modules.modeling")
    assert flat_name("kit.modules.modeling") + ".py" in files
    for name, source in files.items():
        assert "/" not in name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not any(str(n).split(".")[0] == "kit" for n in names if n)


def test_the_bundle_imports_where_kit_is_not_installed(tmp_path):
    package = tmp_path / "bundled"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, source in bundle("kit.modules.modeling").items():
        (package / name).write_text(source)
    code = """
import sys
sys.modules["kit"] = None
import bundled.kit_modules_modeling as m
print(m.KitLlamaForCausalLM)
from bundled.kit_kernels_linear_attention_dispatch import _step_ops, torch
torch.cuda.get_device_capability = lambda device: (8, 0)
print(_step_ops(torch.device("cuda")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "bundled.kit_modules_modeling.KitLlamaForCausalLM" in done.stdout, done.stderr
    if importlib.util.find_spec("triton"):
        assert "StepOps(hybrid_step=" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "line",
    ["import kit.modules", "from kit.convert.errors import KitError", "from . import modeling", "from .. import x"],
)
def test_imports_that_would_break_are_refused(tmp_path, monkeypatch, line):
    module = tmp_path / "broken_module.py"
    module.write_text(f"{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"cannot bundle[\s\S]*broken_module.py:1"):
        bundle("broken_module")


def test_unknown_modules_are_named():
    with pytest.raises(ValueError, match="no such module"):
        bundle("kit.modules.nothing_here")
