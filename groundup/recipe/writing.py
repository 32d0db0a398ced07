"""A `Recipe` to TOML that reads back equal, and what differs between two."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from groundup.recipe.recipe import Recipe
from groundup.recipe.resolve import derivations, resolve
from groundup.recipe.sections import Section, section_class


def recipe_toml(recipe: Recipe, *, all_settings: bool = False, comments: bool = False) -> str:
    """Write a recipe as TOML that reads back equal: what was written, nothing that follows.

    Args:
        recipe: as it was read; of a resolved one, what follows counts as written.
        all_settings: settings that are not written too, as comments with the values that they have.
        comments: each setting's documentation behind it.
    """
    lines: list[str] = []
    values = {item.setting: item.value for item in derivations(recipe)} if all_settings else {}
    _write_section(lines, recipe, "", all_settings, comments, values)
    return "\n".join(lines).strip() + "\n"


def changed_settings(before: Recipe, after: Recipe) -> list[str]:
    """The settings that differ, as `section.key: old -> new` lines; a stage that came or went, as one."""
    names = before.branches.keys() ^ after.branches.keys()
    stages = [
        f"[{after.section_of(name)}] is new" if name in after.branches else f"[{before.section_of(name)}] is gone"
        for name in sorted(names)
    ]
    without = {"align": names, "quantize": names}
    old, new = (dict(_leaves(recipe.model_dump(mode="json", exclude=without))) for recipe in (before, after))
    return stages + [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def resolved_settings(recipe: Recipe) -> dict[str, str]:
    """Every setting that has a value but the gates, as `section.key` and JSON; what follows from others with it."""
    values = resolve(recipe).model_dump(mode="json", exclude={"name": True, "about": True, "evaluate": {"gates"}})
    return {key: json.dumps(value, ensure_ascii=False) for key, value in _leaves(values) if value is not None}


def _write_section(
    lines: list[str], section: Section, path: str, is_whole: bool, comments: bool, follows: Mapping[str, Any]
) -> None:
    nested: list[tuple[str, Section, bool]] = []
    for name, field in type(section).model_fields.items():
        value, where = getattr(section, name), f"{path}.{name}" if path else name
        is_written = name in section.model_fields_set
        if not (is_whole or is_written):
            continue
        if isinstance(value, Section):
            nested.append((where, value, is_written))
        elif isinstance(value, dict) and value and all(isinstance(item, Section) for item in value.values()):
            nested += [(f"{where}.{key}", item, True) for key, item in value.items()]
        elif isinstance(value, tuple) or section_class(field.annotation) is None:
            if name == "method" and path == f"align.{value}":
                continue
            shown = _toml_value(follows.get(where, value)) if value is not None else ""
            about = f"  # {field.description}" if comments and field.description else ""
            lines.append(f"{'' if is_written and value is not None else '# '}{name} = {shown}".rstrip() + about)
    for where, item, is_written in nested:
        lines.append(f"\n{'' if is_written else '# '}[{where}]")
        _write_section(lines, item, where, is_whole, comments, follows)


def _toml_value(value: object) -> str:
    if isinstance(value, Section):  # one of a list of tables
        value = value.model_dump(exclude_unset=True, exclude_none=True)
    if isinstance(value, tuple | list) and value and all(isinstance(item, Section) for item in value):
        return "[\n" + "".join(f"    {_toml_value(item)},\n" for item in value) + "]"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_key(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    # JSON's strings, numbers and booleans are TOML's too, but for DEL (and surrogate pairs, so no ASCII escapes).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, where)
        else:
            yield where, value
