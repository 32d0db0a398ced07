"""What every section of a recipe is made of: documented, ranged fields that never change once they are read."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _flat(value: object) -> object:
    """`{"gopher": {"min_words": 30}}`, as TOML reads a dotted key, and `{"gopher.min_words": 30}` mean the same."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, object] = {}
    for key, item in value.items():
        inner = _flat(item)
        flat.update(
            {f"{key}.{name}": part for name, part in inner.items()} if isinstance(inner, dict) else {key: inner}
        )
    return flat


ByName = Annotated[dict[str, float | bool], BeforeValidator(_flat)]
"""Numbers by dotted names; false stands for "off"."""

Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""A list of strings; a single string is a list of one."""


def setting(default: Any, about: str, *, affects_result: bool = True, **limits: Any) -> Any:
    """A field with its documentation; `affects_result=False` keeps it out of fingerprints."""
    return Field(default, description=about, json_schema_extra={"affects_result": affects_result}, **limits)


class Section(BaseModel):
    """Common to every section: no unknown keys, nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    def fingerprint_values(self) -> dict[str, Any]:
        """The settings that can change the stage's result, JSON-able."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects_result") is False:
                del values[name]
        return values


def section_class(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, if it is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
