"""A recipe says what is wrong with it all at once, reads back what it writes, and never breaks on odd input."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from groundup.errors import RecipeError
from groundup.recipe import (
    Recipe,
    changed_settings,
    parse_recipe,
    read_recipe,
    recipe_toml,
    resolve,
    shipped_recipes,
)


def problems_of(text: str, *overrides: str) -> dict[str, str]:
    """Where each problem is, and what is said of it."""
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "mine.toml", overrides)
    assert raised.value.exit_code == 2
    assert str(raised.value).startswith("mine.toml: ")
    found = {problem.where: str(problem) for problem in raised.value.problems}
    assert len(found) == len(raised.value.problems), "a problem was reported twice"
    return found


# --- What is wrong, and the way out


def test_ten_mistakes_are_reported_at_once() -> None:
    found = problems_of(
        """
        seed = -1
        name = "../elsewhere"
        treads = 4
        [corpus]
        inputs = []
        validation_share = 1.5
        [tokenizer]
        kind = "bpee"
        vocab_size = "many"
        [pretrain]
        learning_rate = 0.1
        lr = nan
        [tokeniser]
        kind = "bpe"
        """
    )
    expected = {
        "seed = -1": "greater than or equal to 0",
        'name = "../elsewhere"': "pattern",
        "treads": "Did you mean 'threads'?",
        "[corpus] inputs = []": "at least 1",
        "[corpus] validation_share = 1.5": "less than 1",
        '[tokenizer] kind = "bpee"': "'unigram' or 'characters'",
        '[tokenizer] vocab_size = "many"': "valid integer",
        "[pretrain] learning_rate": "no such setting",
        "[pretrain] lr = NaN": "finite",
        "tokeniser": "Did you mean 'tokenizer'?",
    }
    assert found.keys() == expected.keys()
    for where, words in expected.items():
        assert words in found[where]


def test_a_problem_names_the_field_the_value_and_what_it_means() -> None:
    found = problems_of("[pretrain]\nbatch_size = 0")
    assert found == {
        "[pretrain] batch_size = 0": "[pretrain] batch_size = 0: input should be greater than or equal to 1. "
        "(sequences in one optimizer step, over all devices)"
    }


def test_nested_sections_are_named_in_full() -> None:
    assert list(problems_of("[corpus.minhash]\nrows = 0")) == ["[corpus.minhash] rows = 0"]
    gate = '[[evaluate.gates]]\nmetric = "exact_match"\nminimum = 0.5\nmax = 1'
    assert "'min'" in problems_of(gate)["[evaluate.gates] minimum"]
    assert list(problems_of("[align.mine]\nmethod = 'sft'\nepochs = 0")) == ["[align.mine] epochs = 0"]
    assert "'epochs'" in problems_of("[align.sft]\nepoch = 1")["[align.sft] epoch"]


@pytest.mark.parametrize("value", ["3", '"off"', "[1, 2]"])
def test_a_value_where_a_section_belongs_is_explained(value: str) -> None:
    (said,) = problems_of(f"pretrain = {value}").values()
    assert said.startswith("pretrain")
    assert "[section]" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("warmup_share = 0.6\ndecay_share = 0.6", "lower one of them"),
        ("batch_size = 30\nmicro_batch_size = 8", "choose a divisor"),
        ("tokens = 0", "at least 1"),
        ('tokens = "all"', "compute-optimal"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: str, words: str) -> None:
    assert any(words in said for said in problems_of(f"[pretrain]\n{settings}").values())


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("[sft]\nepochs = 1", "[sft]", "Write [align.sft], and its init as start ="),
        ("[align.sft]\ninit = 'there'", "[align.sft] init", "is called start now"),
        ("[evaluate.gates]\nmin_exact_match = 0.8", "[evaluate] gates", "write [[evaluate.gates]] with metric ="),
        ("[model]\nrope_base = 1e4", "[model] rope_base", "is called rope_theta now"),
        ("[model]\nrope_share = 0.5", "[model] rope_share", "is called partial_rotary_factor now"),
        ("[model]\nrouter_loss = 0.1", "[model] router_loss", "is called router_aux_loss_coef now"),
        ("[pretrain]\nclip = 1", "[pretrain] clip", "is called max_grad_norm now"),
        ("[align.sft]\non_trouble = 'skip'", "[align.sft] on_trouble", "is called on_spike now"),
        ("[corpus]\nclip = 1", "[corpus] clip", "no such setting"),
    ],
)
def test_what_had_another_name_once_is_told_its_new_one(text: str, where: str, words: str) -> None:
    found = problems_of(text)
    assert list(found) == [where]
    assert words in found[where]


@pytest.mark.parametrize(
    "name",
    [
        "corpus",
        "pretrain",
        "model",
        "evaluate",
        "generate",
        "align",
        "start",
        "before-sft",
        "",
        "a.b",
        "-a",
        "a/b",
        "ü",
    ],
)
def test_a_stage_cannot_have_a_name_that_is_taken_or_that_no_folder_has(name: str) -> None:
    found = problems_of(f'[align."{name}"]\nmethod = "sft"\n[align."é"]\nmethod = "sft"')
    assert found.keys() == {"recipe"}
    assert found["recipe"].count("choose another") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[align.assistant]\nstart = "pretrain"', "'assistant' is no method. Methods: sft"),
        ('[align.mine]\nmethod = "stf"', "'stf' is no method. Did you mean 'sft'?"),
        ("[align.sft]\nmethod = []", "'[]' is no method"),
        ('[align.sft]\nstart = "sft"', "[align.sft] needs itself"),
        ('[align.a]\nmethod = "sft"\nstart = "b"\n[align.b]\nmethod = "sft"\nstart = "a"', "[align.a] needs itself"),
        (
            '[align.a]\nmethod = "sft"\nstart = "b"\n[align.b]\nmethod = "sft"\ncompute = "a"',
            "[align.b] needs itself, by its start or compute",
        ),
        ('[align.sft]\ncompute = "pretrain"', 'compute = "pretrain": no other stage of this recipe has that name'),
        ('[align.sft]\ncompute = "dpo"', 'compute = "dpo": no other stage'),
        (
            '[[evaluate.gates]]\nmetric = "exact_match"\nmodel = "sft"\nmin = 1',
            '"sft" is no stage of this recipe: pretrain',
        ),
        (
            '[[evaluate.gates]]\nmetric = "exact_match"\nover = "dpo"\nmin = 1',
            '"dpo" is no stage of this recipe: pretrain',
        ),
        ('[[evaluate.gates]]\nmetric = "exact_match"', "can never fail: set min or max"),
        ('[generate]\nmodel = "sft"', 'model = "sft": is no stage of this recipe: pretrain'),
        ('[align.sft]\nstart = "there"\n[generate]\nmodel = "pretrain"', "is no stage of this recipe: sft"),
    ],
)
def test_stages_that_cannot_be_are_refused(text: str, words: str) -> None:
    (said,) = problems_of(text).values()
    assert words in said


def test_broken_toml_names_the_line() -> None:
    (said,) = problems_of("seed = 1\n[corpus\n").values()
    assert "line 2" in said


def test_a_missing_recipe_names_the_nearest_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'demo'"):
        read_recipe("demoo")
    with pytest.raises(RecipeError, match="Shipped recipes: demo"):
        read_recipe(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkdir, "is a folder"),
        (os.mkfifo, "is not an ordinary file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not an ordinary file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.write_bytes('about = "Größe"'.encode("latin-1")), "UTF-8"),
        (lambda path: path.write_bytes(b"#" * (1 << 20) + b"#"), "is larger than"),
        (lambda path: path.write_text("a = " + "[" * 9_999), "TOML"),
        (lambda path: path.write_text("a" + ".a" * 9_999 + " = 1"), "nested more than 16 deep"),
        (lambda path: path.write_text("seed = " + "9" * 9_999), "TOML"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "mine.toml")
    with pytest.raises(RecipeError, match=rf"mine\.toml: 1 problem\n.*{words}"):
        read_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[pretrain]\nlr = true", "lr = true: is true or false where a number stands"),
        ("[corpus.mix]\na = true", "mix: is true or false where a number stands"),
        ("[pretrain]\nbatch_size = 10_000_000_000_000_000", "is beyond 1e"),
        ("[pretrain]\nlr = nan", "lr = NaN"),
    ],
)
def test_what_is_no_number_of_a_setting_is_refused(text: str, words: str) -> None:
    assert words in " ".join(f"{where}: {what}" for where, what in problems_of(text).items())


# --- Overrides


@pytest.mark.parametrize("value", ['["grpo"]', "{ a = 1 }", "3"])
def test_an_outline_is_refused_like_a_recipe(value: str) -> None:
    """Of a section that no method has read, `compute` is looked up in the graph all the same."""
    with pytest.raises(RecipeError, match="compute"):
        parse_recipe(f"[align.sft]\ncompute = {value}", "mine.toml", outline=True)


def test_overrides_are_read_as_toml_or_else_as_text() -> None:
    recipe = parse_recipe(
        "[pretrain]\nlr = 0.5",
        "mine.toml",
        [
            "pretrain.lr=3e-4",
            "corpus.inputs=my.txt",
            "corpus.languages=[]",
            "pretrain.compile=true",
            'about="1 = 1"',
            "align.sft.data = ['a.jsonl', 'b.jsonl']",
            "pretrain.tokens=compute-optimal",
        ],
    )
    assert recipe.pretrain.lr == 3e-4
    assert recipe.corpus.inputs == ("my.txt",)
    assert recipe.corpus.languages == ()
    assert recipe.pretrain.compile is True
    assert recipe.about == "1 = 1"
    assert recipe.align["sft"].model_dump()["data"] == ("a.jsonl", "b.jsonl")
    assert recipe.pretrain.tokens == "compute-optimal"


def test_the_last_override_of_a_setting_counts() -> None:
    assert parse_recipe("", "mine.toml", ["seed=2", "seed=3"]).seed == 3


def test_wrong_overrides_are_reported_with_the_recipes_own_mistakes() -> None:
    found = problems_of("seed = -1", "pretrain.lr", "=3", "seed.more=1", "pretrain.batch=4")
    assert found.keys() == {
        "seed = -1",
        "--set pretrain.lr",
        "--set =3",
        "--set seed.more=1",
        "[pretrain] batch",
    }


# --- Defaults and what ships


def test_an_empty_recipe_is_valid_and_takes_its_files_name(tmp_path: Path) -> None:
    path = tmp_path / "my.first-model.toml"
    path.write_text("")
    recipe = read_recipe(path)
    assert recipe == Recipe(name="my.first-model")
    assert recipe.align == {}


def test_every_shipped_recipe_is_valid_and_says_what_it_is() -> None:
    assert {"demo", "shakespeare"} <= shipped_recipes().keys()
    for name, about in shipped_recipes().items():
        recipe = read_recipe(name)
        assert recipe.name == name
        assert recipe.about == about != ""


def test_the_full_demo_is_the_demo_with_more_branches() -> None:
    demo, full = read_recipe("demo"), read_recipe("demo-full")
    for name in ("corpus", "tokenizer", "model", "pretrain", "generate"):
        assert getattr(full, name) == getattr(demo, name)
    assert list(demo.align) == ["sft", "reward", "ppo", "dpo", "grpo", "grpo-control"]
    assert {name: full.align[name] for name in demo.align} == demo.align
    assert full.align.keys() - demo.align.keys() == {"ppo-control", "ppo-loose", "dpo-control"}
    assert full.evaluate.tasks == demo.evaluate.tasks
    assert {(gate.metric, gate.model, gate.over) for gate in full.evaluate.gates} > {
        (gate.metric, gate.model, gate.over) for gate in demo.evaluate.gates
    }


def test_the_demo_holds_its_gates() -> None:
    gates = read_recipe("demo").evaluate.gates
    assert [(gate.metric, gate.model, gate.over, gate.min, gate.max) for gate in gates] == [
        ("bits_per_byte", "pretrain", "start", None, -1.5),
        ("exact_match", "pretrain", None, None, 0.05),
        ("exact_match", "sft", None, 0.95, None),
        ("bits_per_byte", "sft", "start", None, 0.1),
        ("fitting_share", "sft", None, 0.8, None),
        ("refusal_rate", "sft", None, None, 0.05),
        ("pair_accuracy", "reward", None, 0.8, None),
        ("polite_share", "ppo", None, 0.9, None),
        ("exact_match", "ppo", "start", -0.08, None),
        ("preference_accuracy", "dpo", None, 0.93, None),
        ("exact_match_hard", "grpo", "start", 0.1, None),
        ("exact_match_sums", "grpo", "start", -0.02, None),
        ("exact_match_hard", "grpo", "grpo-control", 0.0, None),
    ]


def test_every_setting_is_documented() -> None:
    recipe = parse_recipe("[align.sft]", "mine.toml")
    lines = recipe_toml(recipe, all_settings=True, comments=True).splitlines()
    assert sum("=" in line for line in lines) > 150
    assert [line for line in lines if "=" in line and "  # " not in line] == []


def test_a_recipe_cannot_be_changed_in_place() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError):
        recipe.seed = 2


# --- Laws

texts = st.text(st.characters(codec="utf-8"), max_size=20)
shares = st.floats(0.0, 0.5)
positive = st.floats(1e-12, 1.0)
names = st.from_regex(r"[a-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(
    lambda name: name not in {*Recipe.model_fields, "align", "quantize", "start"} and not name.startswith("before-")
)
stages = st.fixed_dictionaries(
    {"method": st.just("sft")},
    optional={
        "start": st.just("pretrain") | texts.filter(bool),
        "epochs": st.floats(0.01, 1000),
        "data": st.lists(texts, min_size=1),
        "groups": st.lists(st.fixed_dictionaries({"match": texts.filter(bool), "lr_scale": positive}), max_size=2),
    },
)
gates = st.fixed_dictionaries(
    {"metric": texts, "min": st.floats(0, 1)}, optional={"over": st.just("start"), "max": st.floats(0, 1)}
)
recipes = st.builds(
    lambda seed, about, threads, corpus, lr, warmup, tokens, align, gates: Recipe.model_validate(
        {
            "seed": seed,
            "about": about,
            "threads": threads,
            "corpus": corpus,
            "pretrain": {"lr": lr, "warmup_share": warmup, "decay_share": 0.5, "tokens": tokens},
            "align": align,
            "evaluate": {"gates": gates},
        }
    ),
    st.integers(0, 2**31 - 1),
    texts,
    st.none() | st.integers(1, 1024),
    st.fixed_dictionaries({"inputs": st.lists(texts, min_size=1, max_size=3)}, optional={"languages": st.lists(texts)}),
    positive,
    shares,
    st.integers(1, 10**15) | st.just("compute-optimal"),
    st.dictionaries(names, stages, max_size=3).filter(
        lambda align: all(stage.get("start") not in align for stage in align.values())
    ),
    st.lists(gates, max_size=2),
)


@given(recipes, st.booleans(), st.booleans())
def test_a_recipe_reads_back_what_it_writes(recipe: Recipe, every: bool, comments: bool) -> None:
    again = parse_recipe(recipe_toml(recipe, all_settings=every, comments=comments), "again.toml")
    assert again == recipe
    if not every:
        assert resolve(again) == resolve(recipe)  # what follows depends on what was written


@given(recipes, recipes)
def test_the_changes_are_empty_exactly_for_equal_recipes(one: Recipe, other: Recipe) -> None:
    assert changed_settings(one, one) == []
    assert (changed_settings(one, other) == []) == (one == other)


overrides_of_all_kinds = st.text(max_size=30) | st.from_regex(
    r"(seed|pretrain|pretrain\.lr|align|align\.sft|align\.sft\.method|a\.b\.c|\.)=.{0,12}"
)


def assert_read_or_explained(text: str, overrides: list[str]) -> None:
    """Either a recipe comes out, or a `RecipeError` that says why; nothing else."""
    try:
        assert isinstance(parse_recipe(text, "mine.toml", overrides), Recipe)
    except RecipeError as error:
        if not error.problems:
            pytest.fail("refused without a reason")


@given(st.lists(overrides_of_all_kinds, max_size=3))
def test_no_override_breaks_the_reader(overrides: list[str]) -> None:
    assert_read_or_explained("seed = 1", overrides)


sections = st.sampled_from(
    ["seed", "name", "corpus", "pretrain", "align", "sft", "method", "start", "evaluate", "gates", "lr", "inputs"]
)
values = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(sections | st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(sections | st.text(max_size=3), values, max_size=4))
def test_no_recipe_breaks_the_reader(written: dict[str, object]) -> None:
    assert_read_or_explained("\n".join(f"{_quoted(key)} = {_toml(value)}" for key, value in written.items()), [])


def _quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _quoted(value)
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return "{" + ", ".join(f"{_quoted(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
        case _:
            return str(value)


def test_settings_without_an_effect_on_the_result_are_no_part_of_its_fingerprint() -> None:
    quiet = parse_recipe("[pretrain]\nlog_every = 1\ncheckpoint_seconds = 5", "a.toml").pretrain
    loud = parse_recipe("[pretrain]\nlog_every = 99\ncheckpoint_seconds = 0", "a.toml").pretrain
    other = parse_recipe("[pretrain]\nlr = 1e-5", "a.toml").pretrain
    assert quiet.fingerprint_values() == loud.fingerprint_values()
    assert quiet.fingerprint_values() != other.fingerprint_values()


def test_a_changed_setting_is_shown_before_and_after() -> None:
    before = parse_recipe("[pretrain]\nlr = 0.1", "a.toml")
    after = parse_recipe("[pretrain]\nlr = 0.2\n[align.sft]\nepochs = 2.0", "a.toml")
    changes = changed_settings(before, after)
    assert "pretrain.lr: 0.1 -> 0.2" in changes
    assert "[align.sft] is new" in changes
    assert not any(line.startswith(("corpus", "pretrain.muon")) for line in changes)


def test_a_key_named_like_a_type_is_only_an_unknown_key():
    with pytest.raises(RecipeError, match="int: no such setting"):
        parse_recipe("int = []", "my.toml")
    with pytest.raises(RecipeError, match=r"\[pretrain\] int: no such setting"):
        parse_recipe("[pretrain]\nint = 1", "my.toml")
