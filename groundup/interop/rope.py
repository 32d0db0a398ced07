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

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
"""The fields of each kind."""


def read_rope(fields: Fields, default_theta: float, context: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a model.

    Args:
        fields: of its configuration.
        default_theta: of its family.
        context: its length, which stands for a missing original one.
    """
    table = _table(fields)
    base = fields.number("rope_theta", default_theta)
    own = table.get("rope_theta", base)
    if not is_positive(own):
        fields.refuse("rope_parameters", "rope_theta must be a number above 0.")
        own = base
    if fields.get("rope_theta") is not None and own != base:
        fields.refuse("rope_theta", f"and rope_theta = {own} in rope_parameters disagree.")
    share = fields.get("partial_rotary_factor")
    if share not in (None, 1) or table.get("partial_rotary_factor", 1) not in (None, 1):
        fields.refuse("partial_rotary_factor", "this family rotates whole heads.")
    return {"rope_theta": float(own), "rope_scaling": _scaling(fields, table, context)}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """RoPE's fields in a `config.json`."""
    base, scaling = resolved_rope(config)
    table: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        table = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            table |= {
                "original_max_position_embeddings": scaling.original_context,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
            }
            assert config.rope_scaling is not None
            if config.rope_scaling.attention_factor is not None:  # else the paper's, there as here
                table["attention_factor"] = scaling.attention_factor
        elif scaling.kind == "llama3":
            table |= {
                "original_max_position_embeddings": scaling.original_context,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
            }
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
    values: dict[str, Any] = {"kind": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind != "linear":
        values["original_context"] = scaling.original_context
    if scaling.kind == "llama3":
        values["low_frequency_factor"] = float(scaling.low_frequency_factor)
        values["high_frequency_factor"] = float(scaling.high_frequency_factor)
    if scaling.kind == "yarn":
        factor = scaling.attention_factor
        values["attention_factor"] = _yarn_factor(scaling.factor) if factor is None else float(factor)
        values["beta_fast"], values["beta_slow"] = float(scaling.beta_fast), float(scaling.beta_slow)
    return config.rope_theta, RopeScaling(**values)


def _table(fields: Fields) -> dict[str, Any]:
    """The one table of both generations' names."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            fields.refuse(name, "must be a table.")
            continue
        table = dict(value)
        kind = table.pop("type", None)
        table.setdefault("rope_type", kind or "default")
        if kind not in (None, table["rope_type"]):
            fields.refuse(name, "type and rope_type disagree.")
        found.append(table)
    if len(found) == 2:
        for table in found:  # only transformers 5 has the base in it
            table.setdefault("rope_theta", fields.get("rope_theta", found[0].get("rope_theta")))
        if found[0] != found[1]:
            fields.refuse("rope_scaling", "and rope_parameters disagree.")
    return found[0] if found else {}


def _scaling(fields: Fields, table: dict[str, Any], context: int) -> RopeScaling | None:
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    kind = table.get("rope_type", "default")
    own = fields.get("original_max_position_embeddings")  # outside of the table: comes first, as in transformers
    if not isinstance(kind, str) or kind not in _KEYS:
        fields.refuse(name, f"rope_type is not one that groundup computes: {', '.join(_KEYS)}.")
        return None
    odd = sorted(table.keys() - {*_KEYS[kind], "rope_type", "rope_theta", "partial_rotary_factor"})
    if odd:
        fields.refuse(name, f"{odd[0]} is no part of rope_type {kind!r}.")
    if kind == "default":
        return None
    values = {key: table[key] for key in _KEYS[kind] if table.get(key) is not None and key != "truncate"}
    if table.get("truncate") is False:
        fields.refuse(name, "truncate = false is not computed by groundup.")
    if kind != "linear":
        values["original_max_position_embeddings"] = own or values.get("original_max_position_embeddings", context)
    missing = {"linear": {"factor"}, "llama3": {*_KEYS["llama3"]}, "yarn": {"factor"}}[kind] - values.keys()
    wrong = [key for key, value in values.items() if not is_positive(value)]
    if missing or wrong:
        fault = f"{min(missing)} is missing." if missing else f"{wrong[0]} must be a number above 0."
        fields.refuse(name, fault)
        return None
    original = values.get("original_max_position_embeddings")
    scaling: dict[str, Any] = {"kind": kind, "factor": float(values["factor"])}
    if original is not None:
        scaling["original_context"] = int(original)
    if kind == "llama3":
        scaling["low_frequency_factor"] = float(values["low_freq_factor"])
        scaling["high_frequency_factor"] = float(values["high_freq_factor"])
    if kind == "yarn":
        scaling["beta_fast"] = float(values.get("beta_fast", 32.0))
        scaling["beta_slow"] = float(values.get("beta_slow", 1.0))
        scaling["attention_factor"] = _attention_factor(values)
    found = RopeScaling(**scaling)
    for problem in found.problems():
        fields.refuse(name, str(problem).replace("[model] ", ""))
    return found if not found.problems() else None


def _attention_factor(values: dict[str, Any]) -> float | None:
    """YaRN's factor as transformers takes it: given, or from DeepSeek's two scales, or None for the paper's."""
    if "attention_factor" in values:
        return float(values["attention_factor"])
    if "mscale" in values and "mscale_all_dim" in values:
        factor = float(values["factor"])
        return _yarn_factor(factor, values["mscale"]) / _yarn_factor(factor, values["mscale_all_dim"])
    return None


def _yarn_factor(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
