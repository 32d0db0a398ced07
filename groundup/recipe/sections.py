"""What every section of a recipe is made of: documented, ranged fields that never change once they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


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


LARGEST = 10**15
"""A hundred times the tokens of the longest runs."""


class Section(BaseModel):
    """Common to every section: no unknown keys, nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        """`true` would be taken for 1, and what no setting can mean would be computed with."""
        types = _types_in(cls.model_fields[str(info.field_name)].annotation)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for item in items if types & {int, float} else ():
            if isinstance(item, bool) and bool not in types:
                raise ValueError("is true or false where a number stands")
            if isinstance(item, int | float) and abs(item) > LARGEST:
                raise ValueError(f"is beyond {LARGEST:.0e}, which no setting here can be")
        return value

    def fingerprint_values(self) -> dict[str, Any]:
        """The settings that can change the stage's result, JSON-able."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects_result") is False:
                del values[name]
        return values


def _types_in(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_types_in, get_args(annotation))) if get_origin(annotation) is not Literal else set()


def section_class(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, if it is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
