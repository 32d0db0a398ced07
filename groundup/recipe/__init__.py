"""The recipe: what the user asked for, as one TOML file with one section per stage.

In: a TOML file (or the name of a recipe that ships with groundup) and `section.key=value`
overrides. Out: a frozen, typed `Recipe`. Every field has a type, a range, a default and a line of
documentation; unknown keys are refused with the nearest valid name; all problems are reported at once.
A field left unset (`None`) is derived later, by the stage that needs it, which states its reason; what follows from
the model's one number (`[model] size`) is filled in at once.
"""

from groundup.recipe.data import (
    ClassifierSettings,
    CorpusSettings,
    DecontaminationSettings,
    MinHashSettings,
    ShardsSettings,
    TokenizerSettings,
)
from groundup.recipe.follow import choices
from groundup.recipe.model import DEFAULT_PRESET, ModelSettings, RopeScalingSettings
from groundup.recipe.reading import parse_recipe, read_recipe, shipped_recipes
from groundup.recipe.sections import Section, Texts
from groundup.recipe.stages import (
    EvaluateSettings,
    Gates,
    GenerateSettings,
    GroupSettings,
    OptimizerName,
    OptimizerSettings,
    PrecisionName,
    PretrainSettings,
    SFTSettings,
)
from groundup.recipe.whole import Recipe
from groundup.recipe.writing import changed_settings, recipe_toml

__all__ = [
    "DEFAULT_PRESET",
    "ClassifierSettings",
    "CorpusSettings",
    "DecontaminationSettings",
    "EvaluateSettings",
    "Gates",
    "GenerateSettings",
    "GroupSettings",
    "MinHashSettings",
    "ModelSettings",
    "OptimizerName",
    "OptimizerSettings",
    "PrecisionName",
    "PretrainSettings",
    "Recipe",
    "RopeScalingSettings",
    "SFTSettings",
    "Section",
    "ShardsSettings",
    "Texts",
    "TokenizerSettings",
    "changed_settings",
    "choices",
    "parse_recipe",
    "read_recipe",
    "recipe_toml",
    "shipped_recipes",
]
