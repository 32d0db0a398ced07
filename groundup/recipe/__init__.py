"""The recipe: what the user asked for, as one TOML file with one section per stage.

In: a TOML file (or the name of a recipe that ships with groundup) and `section.key=value`
overrides. Out: a frozen, typed `Recipe`. Every field has a type, a range, a default and a line of
documentation; unknown keys are refused with the nearest valid name; all problems are reported at once.
Reading gives what was written; `resolve` gives what follows from it; what depends on the machine is decided by the
stage that needs it. Which stages and methods there are says `registry.py`.
"""

from groundup.recipe.data import (
    CorpusSettings,
    MinHashSettings,
    ShardsSettings,
    TokenizerSettings,
)
from groundup.recipe.model import DEFAULT_PRESET, ModelSettings, RopeScalingSettings
from groundup.recipe.reading import parse_recipe, read_recipe, shipped_recipes
from groundup.recipe.recipe import BEFORE, Recipe
from groundup.recipe.registry import register, registered
from groundup.recipe.resolve import derivations, resolve, resolve_optimizer
from groundup.recipe.sections import Section, Texts, setting
from groundup.recipe.stages import (
    AlignSettings,
    ControlSettings,
    DuringSettings,
    EvaluateSettings,
    Gate,
    GenerateSettings,
    GroupSettings,
    OptimizerName,
    OptimizerSettings,
    PrecisionName,
    PretrainSettings,
    QuantizeSettings,
    StartSettings,
)
from groundup.recipe.writing import changed_settings, recipe_toml, resolved_settings

__all__ = [
    "BEFORE",
    "DEFAULT_PRESET",
    "AlignSettings",
    "ControlSettings",
    "CorpusSettings",
    "DuringSettings",
    "EvaluateSettings",
    "Gate",
    "GenerateSettings",
    "GroupSettings",
    "MinHashSettings",
    "ModelSettings",
    "OptimizerName",
    "OptimizerSettings",
    "PrecisionName",
    "PretrainSettings",
    "QuantizeSettings",
    "Recipe",
    "RopeScalingSettings",
    "Section",
    "ShardsSettings",
    "StartSettings",
    "Texts",
    "TokenizerSettings",
    "changed_settings",
    "derivations",
    "parse_recipe",
    "read_recipe",
    "recipe_toml",
    "register",
    "registered",
    "resolve",
    "resolve_optimizer",
    "resolved_settings",
    "setting",
    "shipped_recipes",
]
