"""Shapes by name: the presets of `presets.toml`, and a shape with some of its fields replaced.

A preset is an entry of a data file; nothing in the code knows one by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from groundup.errors import Problem, RecipeError
from groundup.model.config import ModelConfig, RopeScaling


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files(__package__).joinpath("presets.toml").read_text("utf-8"))


def preset_names() -> list[str]:
    """The presets' names, small to large within a family."""
    return list(_presets())


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset's configuration, with some fields replaced as by `reshaped`.

    Raises:
        RecipeError: no such preset or field, or values that do not fit together.
    """
    presets = _presets()
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Presets: {', '.join(presets)}."
        raise RecipeError("model", [Problem(f"[model] preset = {name!r}", "no such preset.", fix)])
    return reshaped(presets[name], overrides)


def reshaped(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> ModelConfig:
    """A configuration with some fields replaced.

    Widths that follow from others are derived again when only one side is overridden: `head_dim` from
    `d_model / n_heads`, `n_kv_heads` from `n_heads`, `d_ff` in proportion to `d_model`.

    Args:
        base: fields and values, as in `presets.toml` or of `ModelConfig.to_dict`.
        overrides: what replaces them.

    Raises:
        RecipeError: no such field, or values that do not fit together.
    """
    _check_names(overrides)
    base = dict(base)
    changed = {key for key, value in overrides.items() if base.get(key) != value}
    if "n_heads" in changed and "n_kv_heads" not in overrides:
        same = base["n_heads"] == base["n_kv_heads"]
        base["n_kv_heads"] = overrides["n_heads"] if same else min(base["n_kv_heads"], overrides["n_heads"])
    if changed & {"n_heads", "d_model"} and "head_dim" not in overrides:
        width, heads = overrides.get("d_model", base["d_model"]), overrides.get("n_heads", base["n_heads"])
        if width % heads:
            what = f"is not a multiple of n_heads = {heads}."
            raise RecipeError("model", [Problem(f"[model] d_model = {width}", what, "Change one, or set head_dim.")])
        base["head_dim"] = width // heads
    if "d_model" in changed and "d_ff" not in overrides:
        base["d_ff"] = max(1, round(base["d_ff"] * overrides["d_model"] / base["d_model"]))
    return ModelConfig(**_typed({**base, **overrides}))


def _check_names(overrides: Mapping[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    problems = []
    for key in overrides:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problems.append(Problem(f"[model] {key}", "no such field.", f"Did you mean {near[0]!r}?" if near else None))
    if problems:
        raise RecipeError("model", problems)


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a TOML file can only say as a list or a table, as `ModelConfig` has it."""
    typed = dict(values)
    if isinstance(typed.get("attention"), (list, str)):
        patterns = typed["attention"]
        typed["attention"] = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if isinstance(typed.get("rope_scaling"), Mapping):
        try:
            typed["rope_scaling"] = RopeScaling(**typed["rope_scaling"])
        except TypeError as error:
            reason = str(error).replace("RopeScaling.__init__() ", "")
            known = ", ".join(field.name for field in dataclasses.fields(RopeScaling))
            raise RecipeError("model", [Problem("[model] rope_scaling", f"{reason}.", f"Fields: {known}.")]) from error
    return typed
