"""A `Recipe` to TOML that reads back equal, and what differs between two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from groundup.recipe.recipe import Recipe
from groundup.recipe.resolve import derivations
from groundup.recipe.sections import Section, section_class


def recipe_toml(recipe: Recipe, *, all_settings: bool = False, comments: bool = False) -> str:
    """Write a recipe as TOML that reads back equal.

    Args:
        recipe: as it was read; of a resolved one, what follows counts as written.
        all_settings: defaults too; what follows from other settings, or is unset, stands there as a comment.
        comments: each setting's documentation behind it.
    """
    lines: list[str] = []
    follows = {item.setting: item.value for item in derivations(recipe)} if all_settings else {}
    _write_section(lines, recipe, "", all_settings, comments, follows)
    return "\n".join(lines).strip() + "\n"


def changed_settings(before: Recipe, after: Recipe) -> list[str]:
    """The settings that differ, as `section.key: old -> new` lines."""
    old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(after.model_dump(mode="json")))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _write_section(
    lines: list[str], section: Section, path: str, is_whole: bool, comments: bool, follows: Mapping[str, Any]
) -> None:
    nested: list[tuple[str, Section]] = []
    tables: list[tuple[str, Section]] = []
    for name, field in type(section).model_fields.items():
        value, where = getattr(section, name), f"{path}.{name}" if path else name
        if not (is_whole or name in section.model_fields_set):
            continue
        if isinstance(value, Section):
            nested.append((where, value))
        elif isinstance(value, dict) and value and all(isinstance(item, Section) for item in value.values()):
            nested += [(f"{where}.{key}", item) for key, item in value.items()]
        elif isinstance(value, tuple) and value and all(isinstance(item, Section) for item in value):
            tables += [(where, item) for item in value]
        elif section_class(field.annotation) is None and not (name == "method" and path == f"align.{value}"):
            about = f"  # {field.description}" if comments and field.description else ""
            if where in follows:
                lines.append(f"# {name} = {_toml_value(follows[where])}  # follows from other settings")
            elif value is not None and value != {}:
                lines.append(f"{name} = {_toml_value(value)}{about}")
            elif is_whole:
                lines.append(f"# {name} ={about}")
    for where, item in nested:
        lines.append(f"\n[{where}]")
        _write_section(lines, item, where, is_whole, comments, follows)
    for place, (where, item) in enumerate(tables):
        lines.append(f"\n[[{where}]]")
        is_first = place == 0 or tables[place - 1][0] != where
        _write_section(lines, item, where, False, comments and is_first, follows)


def _toml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    # JSON's strings, numbers and booleans are TOML's too, but for DEL (and surrogate pairs, so no ASCII escapes).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, where)
        else:
            yield where, value
