"""RoPE and its scalings in a `config.json`.

Transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. Both are written,
saying the same.
"""

from __future__ import annotations

import math
from typing import Any

from groundup.interop.fields import Fields, is_positive
from groundup.model import ModelConfig
from groundup.model.config import RopeScaling

_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
"""The fields of each kind, and ours."""


def read_rope(fields: Fields, default_theta: float, context: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a model.

    Args:
        fields: of its configuration.
        default_theta: of its family.
        context: its length, which stands for a missing original one.
    """
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    table = _table(fields)
    base = fields.number("rope_theta", default_theta)
    own = table.get("rope_theta", base)
    if not is_positive(own):
        fields.refuse(name, "rope_theta must be a number above 0.")
    elif fields.get("rope_theta") is not None and own != base:
        fields.refuse("rope_theta", f"and rope_theta = {own} in {name} disagree.")
    share = fields.get("partial_rotary_factor")
    if share not in (None, 1) or table.get("partial_rotary_factor", 1) not in (None, 1):
        fields.refuse("partial_rotary_factor", "this family rotates whole heads.")
    original = fields.get("original_max_position_embeddings")  # outside of the table: comes first, as in transformers
    scaling = _scaling(fields, name, table, original or table.get("original_max_position_embeddings") or context)
    return {"rope_theta": float(own) if is_positive(own) else base, "rope_scaling": scaling}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """RoPE's fields in a `config.json`."""
    base, scaling = resolved_rope(config)
    table: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and config.rope_scaling is not None:
        names = _FIELDS[scaling.kind].items()
        table = {"rope_type": scaling.kind, **{outside: getattr(scaling, inside) for outside, inside in names}}
        if config.rope_scaling.attention_factor is None:  # the paper's, there as here
            table.pop("attention_factor", None)
    return {
        "rope_theta": base,
        "rope_scaling": table if scaling is not None else None,
        "rope_parameters": {"rope_theta": base, **table},
    }


def resolved_rope(config: ModelConfig) -> tuple[float, RopeScaling | None]:
    """The base and the scaling, NTK written as a larger base, and YaRN with its own attention factor."""
    scaling, rotated = config.rope_scaling, config.rotated
    if scaling is None:
        return config.rope_theta, None
    if scaling.kind == "ntk":
        raised = scaling.factor ** (rotated / (rotated - 2)) if rotated > 2 else 1.0
        return config.rope_theta * raised, None
    values = {name: getattr(scaling, name) for name in _FIELDS[scaling.kind].values()}
    if scaling.kind == "yarn" and scaling.attention_factor is None:
        values["attention_factor"] = 0.1 * math.log(scaling.factor) + 1.0
    return config.rope_theta, _typed(scaling.kind, values)


def _table(fields: Fields) -> dict[str, Any]:
    """The one table of both generations' names."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if isinstance(value, dict):
            kind = value.get("rope_type", value.get("type", "default"))
            if value.get("type", kind) != kind:
                fields.refuse(name, "type and rope_type disagree.")
            found.append({**{key: one for key, one in value.items() if key != "type"}, "rope_type": kind})
        elif value is not None:
            fields.refuse(name, "must be a table.")
    if len(found) == 2:
        for table in found:  # only transformers 5 has the base in it
            table.setdefault("rope_theta", fields.get("rope_theta", found[0].get("rope_theta")))
        if found[0] != found[1]:
            fields.refuse("rope_scaling", "and rope_parameters disagree.")
    return found[0] if found else {}


def _scaling(fields: Fields, name: str, table: dict[str, Any], original_context: Any) -> RopeScaling | None:
    kind = table.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _FIELDS:
        fields.refuse(name, f"rope_type is not one that groundup computes: {', '.join(_FIELDS)}.")
        return None
    names = _FIELDS[kind]
    odd = sorted(table.keys() - {*names, "rope_type", "rope_theta", "partial_rotary_factor", "truncate"})
    if odd:
        fields.refuse(name, f"{odd[0]} is no part of rope_type {kind!r}.")
    if table.get("truncate", True) is not True:
        fields.refuse(name, "truncate = false is not computed by groundup.")
    if kind == "default":
        return None
    values = {outside: table[outside] for outside in names if table.get(outside) is not None}
    if "original_max_position_embeddings" in names:
        values["original_max_position_embeddings"] = original_context
    missing = {"factor", *(names if kind == "llama3" else ())} - values.keys()
    wrong = [key for key, value in values.items() if not is_positive(value)]
    if missing or wrong:
        fields.refuse(name, f"{min(missing)} is missing." if missing else f"{wrong[0]} must be a number above 0.")
        return None
    found = _typed(kind, {names[outside]: value for outside, value in values.items()})
    problems = list(found.problems())
    for problem in problems:
        fields.refuse(name, str(problem).replace("[model] ", ""))
    return None if problems else found


def _typed(kind: Any, values: dict[str, Any]) -> RopeScaling:
    """Whole numbers and floats, however they were written."""
    context: dict[str, Any] = {name: int(value) for name, value in values.items() if name == "original_context"}
    return RopeScaling(kind=kind, **{**{name: float(value) for name, value in values.items()}, **context})
