"""What follows from `[model] size` or `depth` where the recipe leaves it open: vocabulary, batch, rates, tokens.

The values stand in the sections as if they had been set, but do not count as set: they are not written into a recipe's
file, and change with the size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from groundup.errors import RecipeError
from groundup.recipe.sections import Section

if TYPE_CHECKING:
    from groundup.model.ladder import Choice
    from groundup.recipe.whole import Recipe

_FOLLOWS = {
    "tokenizer": ("vocab_size",),
    "pretrain": ("tokens", "batch_size", "lr", "muon_lr"),
    "sft": ("lr", "muon_lr"),
}


def following(recipe: Recipe) -> dict[str, set[str]]:
    """The settings, by section, that follow from the recipe's one number."""
    if not recipe.model.follows_from_one_number:
        return {}
    found = {}
    for name, fields in _FOLLOWS.items():
        section = getattr(recipe, name)
        if section is not None:
            found[name] = set(fields) - section.model_fields_set
    if recipe.tokenizer.kind == "characters" or recipe.tokenizer.use is not None:
        found["tokenizer"] = set()  # the text or the file decides
    return found


def choices(recipe: Recipe) -> list[Choice]:
    """Those settings with their values and reasons; empty if the numbers give no model (`check_recipe` says why)."""
    names = following(recipe)
    if not names:
        return []
    # Loads torch, which a recipe that is only read does not need.
    from groundup.model.ladder import Choice, training_choices

    try:
        vocab_size = recipe.tokenizer.vocab_size
        if "vocab_size" in names["tokenizer"]:
            vocab_size = _own_vocabulary(recipe)
        config = recipe.model.config(vocab_size)
    except RecipeError:
        return []
    settings = recipe.pretrain
    asked = settings.tokens if "tokens" not in names["pretrain"] and isinstance(settings.tokens, int) else None
    found = [
        Choice("tokenizer.vocab_size", vocab_size, "for this width; grows slower than the model (arXiv:2407.13623)")
    ]
    found += training_choices(
        config, tokens=asked, sequence_length=settings.sequence_length, optimizer=settings.optimizer
    )
    if recipe.sft is not None:
        of_sft = training_choices(config, tokens=asked, optimizer=recipe.sft.optimizer)
        rates = [choice for choice in of_sft if choice.name in ("pretrain.lr", "pretrain.muon_lr")]
        found += [Choice(choice.name.replace("pretrain", "sft"), choice.value, choice.reason) for choice in rates]
    return [choice for choice in found if _is_in(choice.name, names)]


def filled(recipe: Recipe) -> dict[str, Section]:
    """The sections with what follows in its place, still not counted as set."""
    values: dict[str, dict[str, Any]] = {}
    for choice in choices(recipe):
        section, name = choice.name.split(".")
        values.setdefault(section, {})[name] = choice.value
    sections = {}
    for name, changes in values.items():
        before: Section = getattr(recipe, name)
        after = before.model_copy(update=changes)
        object.__setattr__(after, "__pydantic_fields_set__", set(before.model_fields_set))
        sections[name] = after
    return sections


def _own_vocabulary(recipe: Recipe) -> int:
    from groundup.model.ladder import parse_size, shape_of_depth, shape_of_size

    model = recipe.model
    shape = shape_of_size(parse_size(model.size)) if model.size is not None else shape_of_depth(model.depth or 0)
    return int(shape["vocab_size"])


def _is_in(setting: str, names: dict[str, set[str]]) -> bool:
    section, name = setting.split(".")
    return name in names.get(section, set())
