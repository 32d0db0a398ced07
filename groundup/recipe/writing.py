"""A `Recipe` to TOML that reads back equal, and what differs between two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from groundup.recipe.follow import following
from groundup.recipe.sections import Section, section_class
from groundup.recipe.whole import Recipe


def recipe_toml(recipe: Recipe, *, comments: bool = False) -> str:
    """Write a recipe as TOML that reads back equal; `comments` adds each field's documentation."""
    lines: list[str] = []
    _write_section(lines, recipe, "", comments, following(recipe))
    return "\n".join(lines).strip() + "\n"


def changed_settings(before: Recipe, after: Recipe) -> list[str]:
    """The settings that differ, as `section.key: old -> new` lines."""
    old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(after.model_dump(mode="json")))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _write_section(lines: list[str], section: Section, path: str, comments: bool, follows: dict[str, set[str]]) -> None:
    nested = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            nested.append((name, value))
            continue
        if value is None and section_class(field.annotation) is not None:
            continue
        about = f"  # {field.description}" if comments and field.description else ""
        if name in follows.get(path, ()):
            lines += [f"# {name} = {_toml_value(value)}  # follows from [model]"] if comments else []
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}{about}")
        elif comments:
            lines.append(f"# {name} ={about}")
    for name, value in nested:
        header = f"{path}.{name}" if path else name
        lines.append(f"\n[{header}]")
        _write_section(lines, value, header, comments, follows)


def _toml_value(value: object) -> str:
    if isinstance(value, Section):  # one of a list of tables
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    # JSON's strings, numbers and booleans are TOML's too, but for DEL (and surrogate pairs, so no ASCII escapes).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, where)
        else:
            yield where, value
