"""What a recipe leaves open follows in one place, with its reason, and changes nothing that was written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import RecipeError
from groundup.recipe import PretrainSettings, Recipe, derivations, parse_recipe, recipe_toml, resolve, resolve_optimizer

OVERRIDES = (
    'model.size="1m"', 'model.size="10m"', "model.depth=4", 'tokenizer.kind="characters"', "tokenizer.vocab_size=999",
    "tokenizer.use=there", "pretrain.tokens=1_000_000", "pretrain.tokens=compute-optimal", "pretrain.lr=1e-4",
    "pretrain.batch_size=8", "pretrain.sequence_length=16", "pretrain.weight_decay=0.01", "pretrain.optimizer=lion",
    "pretrain.optimizer=adamw", "pretrain.optimizer=adafactor", "align.sft.optimizer=lion", "align.sft.lr=2e-4",
    "align.sft.start=there", "align.two.method=sft", "align.two.start=sft", "corpus.languages=[]", "evaluate.limit=9",
    "evaluate.tasks=[]",
)  # fmt: skip


def read(*overrides: str) -> Recipe:
    return parse_recipe("", "my.toml", overrides)


def reasons(recipe: Recipe) -> dict[str, str]:
    return {item.setting: item.reason for item in derivations(recipe)}


@given(st.lists(st.sampled_from(OVERRIDES), max_size=6, unique=True))
def test_resolving_again_changes_nothing_and_nothing_written_is_changed(overrides: list[str]) -> None:
    try:
        recipe = read(*overrides)
    except RecipeError:  # such as size and depth
        return
    before = recipe.model_dump_json(), recipe_toml(recipe)
    resolved = resolve(recipe)
    assert (recipe.model_dump_json(), recipe_toml(recipe)) == before
    assert resolve(resolved) == resolved
    assert derivations(resolved) == []
    # A resolved recipe says in full what the other says in short.
    assert parse_recipe(recipe_toml(resolved), "my.toml") == resolved
    assert resolve(parse_recipe(before[1], "my.toml")) == resolved
    for setting, value, reason in derivations(recipe):
        section, _, name = setting.rpartition(".")
        assert len(reason) > 10
        of = {"pretrain": resolved.pretrain, "tokenizer": resolved.tokenizer, "evaluate": resolved.evaluate}
        settings = of[section] if section in of else resolved.align[section.removeprefix("align.")]
        assert getattr(settings, name) == value
        assert setting not in [override.partition("=")[0] for override in overrides]


@pytest.mark.parametrize(
    ("overrides", "lr", "reason"),
    [
        ((), 3e-3, None),
        (("pretrain.lr=0.5",), 0.5, None),
        (("pretrain.optimizer=lion",), 1e-3, "arXiv:2302.06675"),
        (("pretrain.optimizer=adafactor",), 0.03, "arXiv:1804.04235"),
        (("pretrain.optimizer=adamw",), 3e-3, None),
        (('model.size="10m"',), 2.1e-3, "falling as 1/√width"),
        (('model.size="10m"', "pretrain.optimizer=lion"), 7.1e-4, "0.001 at width 128"),
        (('model.size="10m"', "pretrain.optimizer=lion", "pretrain.lr=0.5"), 0.5, None),
    ],
)
def test_each_origin_of_a_learning_rate_says_why(overrides: tuple[str, ...], lr: float, reason: str | None) -> None:
    recipe = read(*overrides)
    assert resolve(recipe).pretrain.lr == lr
    # What is written, or the default of every optimizer, is not derived.
    assert (reason is None) == ("pretrain.lr" not in reasons(recipe))
    assert reason is None or reason in reasons(recipe)["pretrain.lr"]


def test_the_same_rules_hold_for_a_stage_of_any_name() -> None:
    recipe = read("align.mine.method=sft", "align.mine.optimizer=lion", "align.other.method=sft", "align.other.lr=0.1")
    assert set(reasons(recipe)) == {f"align.mine.{name}" for name in ("lr", "weight_decay", "beta2")}
    rates = {name: section.model_dump()["lr"] for name, section in resolve(recipe).align.items()}
    assert rates == {"mine": 1e-3, "other": 0.1}
    assert recipe.align["mine"].model_dump()["lr"] == 3e-3


def test_settings_outside_a_recipe_follow_their_optimizer() -> None:
    settings = PretrainSettings(optimizer="lion", beta2=0.5)
    found = resolve_optimizer(settings)
    assert (found.lr, found.weight_decay, found.beta2) == (1e-3, 0.3, 0.5)
    assert resolve_optimizer(found) == found
    assert settings.lr == 3e-3


def test_without_text_nothing_is_measured_on_it() -> None:
    recipe = read("align.sft.start=there")
    assert resolve(recipe).evaluate.tasks == ()
    assert "validation text" in reasons(recipe)["evaluate.tasks"]
    for other in (
        read("align.sft.start=there", "corpus.inputs=my.txt"),
        read("evaluate.limit=9"),
        read("align.sft.epochs=1"),
    ):
        assert resolve(other).evaluate.tasks == ("bits_per_byte",)
    assert resolve(read("align.sft.start=there", "evaluate.tasks=groundup:tasks")).evaluate.tasks == ("groundup:tasks",)
