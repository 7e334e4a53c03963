"""Recipes: one file a method. Files here are found by themselves; so are the presets in configs/."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kit.convert.errors import ExitCode, KitError, closest, usage_error
from kit.convert.recipe import Recipe


@dataclass(frozen=True)
class Preset:
    """A YAML file in configs/: its name, the recipe it configures, its first comment line, its text."""

    name: str
    recipe: str
    summary: str
    text: str


def available() -> dict[str, type[Recipe]]:
    """Every recipe by name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Recipe) and "name" in vars(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def presets() -> dict[str, Preset]:
    """Every preset by name."""
    found = {}
    for file in sorted(files("kit.configs").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            text, name = file.read_text(encoding="utf-8"), file.name.removesuffix(".yaml")
            found[name] = Preset(name, yaml.safe_load(text)["recipe"], text.splitlines()[0].lstrip("# "), text)
    return found


def preset(name: str) -> Preset:
    """One preset.

    Raises:
        KitError: exit code 2, if there is none of that name.
    """
    known = presets()
    if name not in known:
        raise usage_error(
            f"there is no preset '{name}'", "recipe name", f"{closest(name, known)}`kit recipes ls` lists all"
        )
    return known[name]


def describe(recipe: str) -> list[tuple[str, str, str, str]]:
    """Every option of a recipe: (dotted name, type, default, description)."""
    return _describe(available()[recipe].config_class, "")


def _describe(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += _describe(field.annotation, f"{prefix}{name}.")
            continue
        kind = (
            getattr(field.annotation, "__name__", "") if isinstance(field.annotation, type) else str(field.annotation)
        )
        default = "none" if field.is_required() else str(field.get_default(call_default_factory=True))
        lines.append((prefix + name, kind.replace("typing.", ""), default, field.description or ""))
    return lines


def load_recipes(name_or_file: str, overrides: list[str] | None = None) -> list[Recipe]:
    """Load recipes by preset name or from a YAML file, with `key=value` overrides.

    A file holds one recipe (`recipe: NAME` and its options) or several, applied in order
    (`recipes: [{recipe: NAME, ...}, ...]`; an override then begins with the number: `1.seed=3`).

    Raises:
        KitError: exit code 2, on an unknown name, key or value; it says where and names the closest match.
    """
    known = presets()
    if name_or_file in known:
        text, where = known[name_or_file].text, f"recipe {name_or_file}"
    elif Path(name_or_file).is_file():
        text, where = Path(name_or_file).read_text(encoding="utf-8"), name_or_file
    else:
        raise KitError(
            f"there is no recipe or file '{name_or_file}'",
            where="--recipe",
            next_step=f"{closest(name_or_file, known)}`kit recipes ls` lists all",
            exit_code=ExitCode.USAGE,
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise usage_error(f"not valid YAML: {error}", where, "correct the file") from error
    if not isinstance(content, dict):
        raise usage_error("the file is no mapping of options", where, "start it with `recipe: NAME`")
    entries = content.get("recipes", [content])
    numbered = "recipes" in content
    for override in overrides or []:
        _override(entries, override, numbered)
    return [_make(entry, f"{where}[{number}]" if numbered else where) for number, entry in enumerate(entries)]


def _make(entry: Any, where: str) -> Recipe:
    known = available()
    name = entry.get("recipe") if isinstance(entry, dict) else None
    if name not in known:
        raise usage_error(
            f"unknown recipe '{name}'" if name else "no `recipe: NAME` in it",
            f"{where}: recipe",
            f"{closest(str(name), known)}`kit recipes ls` lists all",
        )
    cls = known[name]
    try:
        return cls(cls.config_class(**entry))
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        hint = ""
        if first["type"] == "extra_forbidden":
            hint = closest(path[-1], _fields(cls.config_class, path[:-1]))
        raise usage_error(
            f"{first['msg']}: {'.'.join(path)}={first['input']!r}",
            f"{where}: {'.'.join(path)}",
            f"{hint}`kit recipes show {name}` describes every option",
        ) from error


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _override(entries: list[Any], override: str, numbered: bool) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().replace("-", "_").split(".")
    number = parts.pop(0) if numbered else "0"
    if not equals or not parts or not all(parts) or not number.isdigit() or int(number) >= len(entries):
        form = "NUMBER.key=value" if numbered else "key=value"
        raise usage_error(f"cannot read the override '{override}'", "--set", f"write {form}, for example seed=1")
    target = entries[int(number)]
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise usage_error(f"'{part}' holds a value, no options", f"--set {override}", "check the dots in the key")
    target[parts[-1]] = yaml.safe_load(value)
