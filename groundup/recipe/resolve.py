"""What a recipe leaves open and follows from the rest of it: `resolve` gives another recipe in which it is filled in.

A number of an optimizer has one of four origins, in this order: the recipe says it; it follows from the model's one
number (`[model] size` or `depth`: vocabulary, tokens, batch and rates); it is the optimizer's own; it is the default.
`optimizer_value` decides, and says which. What depends on the machine (precision, micro-batch, memory) is decided by
the stage that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from groundup.errors import RecipeError
from groundup.recipe.recipe import Recipe
from groundup.recipe.sections import Section
from groundup.recipe.stages import OptimizerName, OptimizerSettings

if TYPE_CHECKING:
    from groundup.model import ModelConfig

Settings = TypeVar("Settings", bound=OptimizerSettings)


class Derived(NamedTuple):
    """A setting that the recipe leaves open, such as `pretrain.lr`, what it becomes, and why."""

    setting: str
    value: Any
    reason: str


OWN: dict[OptimizerName, dict[str, tuple[float, str]]] = {
    "lion": {
        "lr": (1e-3, "a third of AdamW's, since a step by signs is larger (arXiv:2302.06675, section 5)"),
        "weight_decay": (0.3, "as many times AdamW's as the rate is less (arXiv:2302.06675, section 5)"),
        "beta2": (0.99, "Lion's own (arXiv:2302.06675)"),
    },
    "adafactor": {"lr": (0.03, "a share of the weights' own size (arXiv:1804.04235, section 8)")},
}
"""Where an optimizer's defaults are not AdamW's."""


def resolve(recipe: Recipe) -> Recipe:
    """The same recipe with every value filled in that follows from it; one that is resolved already is equal."""
    changes: dict[str, dict[str, Any]] = {}
    for item in derivations(recipe):
        section, _, name = item.setting.rpartition(".")
        changes.setdefault(section, {})[name] = item.value
    align = {
        name: section.model_copy(update=changes.get(f"align.{name}", {})) for name, section in recipe.align.items()
    }
    trunk: dict[str, Section] = {
        name: getattr(recipe, name).model_copy(update=values)
        for name, values in changes.items()
        if not name.startswith("align.")
    }
    return recipe.model_copy(update={**trunk, **({"align": align} if align else {})})


def derivations(recipe: Recipe) -> list[Derived]:
    """The settings that follow, with values and reasons, in the order of the recipe."""
    config, found = _config_of_size(recipe), []
    by_size: dict[str, Derived] = {}
    if config is not None:
        by_size = _training_choices(config, recipe, recipe.pretrain, sequence_length=recipe.pretrain.sequence_length)
        # The text or the file decides over the size of a vocabulary, where one is given.
        is_open = recipe.tokenizer.kind != "characters" and recipe.tokenizer.use is None
        if is_open and "vocab_size" not in recipe.tokenizer.model_fields_set:
            reason = "for this width; grows slower than the model (arXiv:2407.13623)"
            found.append(Derived("tokenizer.vocab_size", config.vocab_size, reason))
    if recipe.has_trunk:
        open_names = {"tokens", "batch_size"} - recipe.pretrain.model_fields_set
        found += [item._replace(setting=f"pretrain.{name}") for name, item in by_size.items() if name in open_names]
        found += _of_optimizer(recipe.pretrain, "pretrain", by_size)
    for name, section in recipe.align.items():
        if isinstance(section, OptimizerSettings):
            rates = (
                {} if config is None or not section.rates_follow_size else _training_choices(config, recipe, section)
            )
            found += _of_optimizer(section, f"align.{name}", rates)
    if not recipe.reads_text and "tasks" not in recipe.evaluate.model_fields_set:
        found.append(Derived("evaluate.tasks", (), "bits per byte need a validation text: [corpus] is left out"))
    return found


def resolve_optimizer(settings: Settings) -> Settings:
    """Settings of a training stage outside a recipe, with what follows from the optimizer."""
    return settings.model_copy(update={item.setting: item.value for item in _of_optimizer(settings, "", {})})


def optimizer_value(settings: OptimizerSettings, name: str, by_size: Mapping[str, Derived]) -> tuple[float, str]:
    """A number of the optimizer, and which rule gave it.

    Args:
        settings: as written.
        name: lr, muon_lr, weight_decay or beta2.
        by_size: what follows from the model's one number, if it has one.
    """
    if name in settings.model_fields_set:
        return getattr(settings, name), "as the recipe says"
    if name in by_size:
        return by_size[name].value, by_size[name].reason
    own = OWN.get(settings.optimizer, {})
    return own.get(name, (getattr(settings, name), "the default"))


def _of_optimizer(settings: OptimizerSettings, section: str, by_size: Mapping[str, Derived]) -> list[Derived]:
    """What is neither written nor the default."""
    found = []
    for name in ("lr", "muon_lr", "weight_decay", "beta2"):
        value, reason = optimizer_value(settings, name, by_size)
        if reason not in ("as the recipe says", "the default"):
            found.append(Derived(f"{section}.{name}".lstrip("."), value, reason))
    return found


def _config_of_size(recipe: Recipe) -> ModelConfig | None:
    """The model of `[model] size` or `depth`; None without, and where the numbers give no model (a check says why)."""
    if not recipe.model.follows_from_one_number:
        return None
    from groundup.model.ladder import parse_size, shape_of_depth, shape_of_size  # loads torch

    model, tokenizer = recipe.model, recipe.tokenizer
    try:
        vocab_size = tokenizer.vocab_size
        if "vocab_size" not in tokenizer.model_fields_set and tokenizer.kind != "characters" and tokenizer.use is None:
            shape = (
                shape_of_size(parse_size(model.size)) if model.size is not None else shape_of_depth(model.depth or 0)
            )
            vocab_size = int(shape["vocab_size"])
        return model.config(vocab_size)
    except RecipeError:
        return None


def _training_choices(
    config: ModelConfig, recipe: Recipe, settings: OptimizerSettings, *, sequence_length: int | None = None
) -> dict[str, Derived]:
    from groundup.model.ladder import training_choices

    tokens = recipe.pretrain.tokens
    asked = tokens if "tokens" in recipe.pretrain.model_fields_set and isinstance(tokens, int) else None
    chosen = training_choices(config, tokens=asked, sequence_length=sequence_length, optimizer=settings.optimizer)
    return {
        name: Derived(name, choice.value, choice.reason)
        for choice in chosen
        if (name := choice.name.removeprefix("pretrain."))
    }
