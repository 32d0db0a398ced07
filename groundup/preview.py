"""A recipe before anything runs: what it becomes on this machine, what is wrong with it, a quick version of it."""

from __future__ import annotations

import torch

from groundup.errors import DataError, GroundupError, Problem, RecipeError
from groundup.evaluation import evaluation_checks
from groundup.recipe import Recipe, derivations, resolve
from groundup.recipe.registry import EVALUATE, load
from groundup.stage import graph


def derived_values(recipe: Recipe) -> list[tuple[str, str, str]]:
    """What the recipe leaves open and what it becomes here, as (setting, value, reason)."""
    found = {item.setting: (_shown(item.value), item.reason) for item in derivations(recipe)}
    if recipe.threads is None:
        found["threads"] = (f"{torch.get_num_threads():,}", "cores that this process may use")
    of_stages = [row for stage in graph(recipe).values() for row in stage.method.derived(stage)]
    known_better = {name for name, _, _ in of_stages}
    rows = [(name, value, reason) for name, (value, reason) in found.items() if name not in known_better]
    return rows + of_stages


def check_recipe(recipe: Recipe, label: str) -> None:
    """Find what only the whole recipe shows: inputs that are missing, sizes that do not fit together.

    Raises:
        RecipeError: with every problem found.
        DataError: nothing is wrong but one input, such as a file that is not there.
    """
    problems: dict[tuple[str, str], Problem] = {}
    of_inputs: list[DataError] = []
    stages = graph(recipe)
    checks = [check for stage in stages.values() for check in stage.method.checks(stage)]
    for where, check in [*checks, *evaluation_checks(resolve(recipe), stages)]:
        try:
            check()
        except RecipeError as error:
            problems |= {(problem.where, problem.what): problem for problem in error.problems}
        except GroundupError as error:
            # A message that begins with its place, as `[corpus] inputs = "x": ...`, needs no other.
            place, _, rest = error.message.partition(": ") if error.message.startswith("[") else (where, "", "")
            problems[place, rest or error.message] = Problem(place, rest or error.message, error.fix)
            if isinstance(error, DataError) and where.endswith(("] inputs", "] data")):
                of_inputs.append(error)
    if len(problems) == len(of_inputs) == 1:
        raise of_inputs[0]
    if problems:
        raise RecipeError(label, list(problems.values()))


def smoke_profile(recipe: Recipe) -> Recipe:
    """The same pipeline, every branch of it, in a fraction of the time: it shows that everything works."""
    changes: dict[str, object] = {"name": f"{recipe.name}-smoke"}
    stages = graph(recipe)
    for name in type(recipe).model_fields:
        if name in stages:
            changes[name] = stages[name].method.quick(getattr(recipe, name))
    for kind in ("align", "quantize"):
        changes[kind] = {name: stages[name].method.quick(section) for name, section in getattr(recipe, kind).items()}
    changes["evaluate"] = load(EVALUATE).quick(recipe.evaluate)
    smaller = recipe.model_copy(update=changes)
    return Recipe.model_validate(smaller.model_dump(exclude_unset=True))


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
