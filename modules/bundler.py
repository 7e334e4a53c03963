"""Copy the modules that a checkpoint runs on into flat files beside its weights.

A checkpoint with code must load where `kit` was never installed. transformers copies and imports single files that sit
beside config.json and refer to each other with `from .name import X`, so `kit.kernels.linear_attention.reference`
becomes `kit_kernels_linear_attention_reference.py`, and imports are rewritten to match.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

BUNDLED = ("kit.families", "kit.kernels", "kit.modules")


def bundle(entry: str) -> dict[str, str]:
    """Return {file name: source} of a module and of all our modules that it imports.

    Args:
        entry: dotted name, for example "kit.modules.modeling".

    Raises:
        ValueError: if a module is not there, or a source imports ours in a form that cannot be rewritten.
    """
    files: dict[str, str] = {}
    todo = [entry]
    while todo:
        module = todo.pop()
        if flat_name(module) + ".py" not in files:
            source, imported = _rewrite(module)
            files[flat_name(module) + ".py"] = source
            todo += imported
    return files


def flat_name(module: str) -> str:
    """kit.modules.modeling -> kit_modules_modeling."""
    return module.replace(".", "_")


def write_code(folder: str | Path, entry: str) -> None:
    """Write a module and all of ours that it imports as flat files into a checkpoint's folder."""
    for name, source in bundle(entry).items():
        (Path(folder) / name).write_text(source, encoding="utf-8")


def _rewrite(module: str) -> tuple[str, list[str]]:
    """Return a module's source with our imports made relative and flat, and the modules they name."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"cannot bundle {module}: there is no such module")
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        ours = (
            any(alias.name.split(".")[0] == "kit" for alias in node.names)
            if isinstance(node, ast.Import)
            else isinstance(node, ast.ImportFrom) and (node.level > 0 or (node.module or "").split(".")[0] == "kit")
        )
        if not ours:
            continue
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module or not node.module.startswith(BUNDLED):
            raise ValueError(
                f"cannot bundle `{ast.unparse(node)}`\n"
                f"  where: {spec.origin}:{node.lineno}\n"  # type: ignore[attr-defined]
                "  next:  write `from kit.modules.x import Y`, or the same of kit.kernels or kit.families"
            )
        first = node.lineno - 1
        lines[first] = lines[first].replace(f"from {node.module} ", f"from .{flat_name(node.module)} ", 1)
        imported.append(node.module)
    return "".join(lines), imported
