"""TOML to a `Recipe`, with every problem that there is, each with a way out."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from groundup.errors import ArtifactError, Problem, RecipeError
from groundup.recipe.recipe import OUTLINE, Recipe
from groundup.recipe.registry import METHODS, find_method
from groundup.recipe.sections import Section, section_class
from groundup.recipe.stages import QuantizeSettings
from groundup.untrusted import ordinary_file, read_bytes

MOST_BYTES, DEEPEST = 1 << 20, 16
"""A recipe is no larger, and its sections do not lie deeper in each other."""

RENAMED = {
    "rope_base": "rope_theta",
    "rope_share": "partial_rotary_factor",
    "router_loss": "router_aux_loss_coef",
    "clip": "max_grad_norm",
    "ramp_from": "batch_warmup_from",
    "ramp_share": "batch_warmup_share",
    "on_trouble": "on_spike",
}
"""Settings that had another name once."""


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes that ship with groundup, each with its line of description."""
    found = {}
    for entry in resources.files("groundup.recipes").iterdir():
        if entry.name.endswith(".toml"):
            found[entry.name.removesuffix(".toml")] = tomllib.loads(entry.read_text("utf-8")).get("about", "")
    return dict(sorted(found.items()))


def read_recipe(source: str | Path, overrides: Sequence[str] = (), *, outline: bool = False) -> Recipe:
    """Read a recipe by path, or by the name of one that ships with groundup.

    Args:
        source: path of a TOML file, or a shipped recipe's name such as "demo".
        overrides: `section.key=value` strings; the value is read as TOML, or else as plain text.
        outline: leave the `[align.NAME]` sections as they are written, so that no method has to be imported.

    Raises:
        RecipeError: with every problem found, each with a way out.
    """
    text, label = _recipe_text(str(source))
    return parse_recipe(text, label, overrides, Path(label).stem, outline=outline)


def parse_recipe(
    text: str, label: str, overrides: Sequence[str] = (), default_name: str | None = None, *, outline: bool = False
) -> Recipe:
    """Turn TOML text into a `Recipe`; `label` names it in messages. The rest is as of `read_recipe`."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of whole numbers of thousands of digits
        if isinstance(error, tomllib.TOMLDecodeError):
            problem = Problem("TOML", f"{error}.", "Mend that line; strings need quotes.")
        elif isinstance(error, RecursionError):
            problem = Problem("TOML", f"is nested more than {DEEPEST} deep, which no section is.")
        else:
            problem = Problem("TOML", "has a whole number of thousands of digits, which no setting is.")
        raise RecipeError(label, [problem]) from error
    problems = _apply_overrides(values, overrides)
    if _is_nested_beyond(values, DEEPEST):
        raise RecipeError(label, [Problem("recipe", f"is nested more than {DEEPEST} deep, which no section is.")])
    values.setdefault("name", default_name or "mine")
    try:
        recipe = Recipe.model_validate(values, context=OUTLINE if outline else None)
    except ValidationError as error:
        # A value that could be of several types has one error for each: one problem is enough.
        found = [_problem(item, values) for item in error.errors()]
        problems += {problem.where: problem for problem in found}.values()
        raise RecipeError(label, problems) from error
    if problems:
        raise RecipeError(label, problems)
    return recipe


def _recipe_text(source: str) -> tuple[str, str]:
    path = Path(source)
    shipped = resources.files("groundup.recipes").joinpath(f"{source}.toml")
    try:
        if path.is_file():
            return read_bytes(path, MOST_BYTES).decode("utf-8"), str(path)
        if "/" not in source and shipped.is_file():
            return shipped.read_text(encoding="utf-8"), f"{source}.toml"
        if os.path.lexists(path):
            ordinary_file(path)
    except UnicodeDecodeError as error:
        raise RecipeError(source, [Problem("file", "is not UTF-8 text.", "Save it as UTF-8.")]) from error
    except (ArtifactError, ValueError) as error:  # ValueError: a name that no file can have
        what = error.message.removeprefix(f"{path}: ") if isinstance(error, ArtifactError) else f"{error}."
        raise RecipeError(source, [Problem("file", what)]) from error
    names = list(shipped_recipes())
    near = difflib.get_close_matches(source, names, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else f"Shipped recipes: {', '.join(names)}."
    raise RecipeError(source, [Problem("recipe", "no such file, and no recipe of that name ships with groundup.", fix)])


def _is_nested_beyond(value: object, most: int) -> bool:
    """Whether dictionaries and lists lie deeper in each other, found without a stack of calls."""
    level = [value]
    for _ in range(most):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for items in inside for item in items]
    return any(isinstance(one, dict | list) for one in level)


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    problems = []
    for item in overrides:
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(f"--set {item}", "is not of the form section.key=value."))
            continue
        try:
            value = tomllib.loads(f"value = {raw.strip()}")["value"]
        except (ValueError, RecursionError):
            value = raw.strip()
        *sections, name = key.strip().split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                problems.append(Problem(f"--set {item}", f"{section} is a value, not a section."))
                break
        else:
            target[name] = value
    return problems


def _problem(item: Any, values: Mapping[str, Any]) -> Problem:
    """One pydantic error in the user's terms: [section] key = value, what is wrong, the way out."""
    parts = list(item["loc"])
    if item["type"] != "extra_forbidden" and parts[-1:] in (["int"], ["literal['compute-optimal']"]):
        parts.pop()  # pydantic's name for one of several types that a value may have
    keys = [part for part in parts if isinstance(part, str)]  # numbers count the items of a list
    section, field = _field_at(keys, values)
    where = f"[{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else (keys[0] if keys else "recipe")
    shown = item.get("input")
    if item["type"] == "extra_forbidden":
        if len(keys) == 1 and keys[0] in METHODS:
            return Problem(
                f"[{keys[0]}]", f"is written [align.{keys[0]}].",
                f"Write [align.{keys[0]}], and its init as start = \"…\" (unset: the recipe's own base model).",
            )  # fmt: skip
        names = list(section.model_fields) if section else []
        new = "start" if keys[0] == "align" and keys[-1] == "init" else RENAMED.get(keys[-1])
        if new in names:
            how = ", divided by experts_per_token" if new == "router_aux_loss_coef" else ""
            return Problem(where, f"is called {new} now.", f"Write: {new} = …{how}")
        near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(names)}."
        if len(keys) == 1 and isinstance(shown, dict):
            fix += f" A stage of a method is written [align.{keys[0]}]."
        return Problem(where, "no such setting.", fix)
    if not isinstance(shown, dict | BaseModel):
        where += f" = {json.dumps(shown, default=str):.200}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    about = f"({field.description})" if field is not None and field.description else None
    if field is None and item["type"] != "value_error":
        about = "Write it as a [section] with key = value lines."
    return Problem(where, message if message.endswith("?") else f"{message}.", about)


def _field_at(location: Sequence[str], values: Mapping[str, Any]) -> tuple[type[Section] | None, FieldInfo | None]:
    """The section class and the field that a pydantic location points at."""
    section: type[Section] | None = Recipe
    field: FieldInfo | None = None
    if location[:1] == ["align"] and len(location) > 1:
        written = values["align"][location[1]]
        method = str(written.get("method", location[1])) if isinstance(written, Mapping) else ""
        section, location = find_method(method).settings if method in METHODS else None, location[2:]
    elif location[:1] == ["quantize"] and len(location) > 1:
        section, location = QuantizeSettings, location[2:]
    for part in location:
        if section is None or part not in section.model_fields:
            break
        field = section.model_fields[part]
        nested = section_class(field.annotation)
        if nested is None:
            break
        section, field = nested, None
    return section, field
