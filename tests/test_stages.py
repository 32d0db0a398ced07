"""The graph of stages that a recipe makes: what is there, what stands on what, which model is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import CommandLine, groundup  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import finished_run

from groundup.errors import ArtifactError, GroundupError, RecipeError, RunError
from groundup.preview import check_recipe, smoke_profile
from groundup.recipe import AlignSettings, Recipe, parse_recipe, recipe_toml, setting
from groundup.recipe.registry import METHODS, Registered
from groundup.run import Run
from groundup.stage import Method, Stage, ancestors, default_model, find_model, graph, select

TRUNK = ["corpus", "tokenizer", "shards", "pretrain"]
BRANCHES = """
[align.last]
method = "sft"
start = "second"

[align.sft]

[align.second]
method = "sft"

[align.control]
method = "sft"
compute = "last"
"""


def read(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, "my.toml", overrides)


def problems_of(recipe: Recipe) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        check_recipe(recipe, "my.toml")
    return [str(problem) for problem in raised.value.problems]


def test_several_assistants_grow_from_one_base_and_each_model_is_scored() -> None:
    stages = graph(read(BRANCHES))
    names = ["sft", "second", "last", "control"]
    assert [name for name in stages if name not in TRUNK and "/" not in name] == names
    assert {name: stages[name].needs for name in names} == {
        "sft": ("pretrain",), "second": ("pretrain",), "last": ("second",), "control": ("pretrain", "last"),
    }  # fmt: skip
    scored = [f"evaluate/{name}" for name in ("before-pretrain", "pretrain", *names)]
    assert [name for name in stages if "/" in name] == scored
    assert {name: stages[name].needs for name in scored} == {
        "evaluate/before-pretrain": ("tokenizer", "corpus"),
        **{f"evaluate/{name}": (name, "corpus") for name in ("pretrain", *names)},
    }
    assert [stage.name for stage in stages.values() if stage.is_control] == ["control"]
    assert ancestors(stages, ["evaluate/last"]) == {*TRUNK, "second", "last", "evaluate/last"}


@given(st.permutations(BRANCHES.strip().split("\n\n")))
def test_a_stage_stands_behind_what_it_needs_in_whatever_order_it_is_written(sections: list[str]) -> None:
    stages = graph(read("\n\n".join(sections)))
    places = {name: place for place, name in enumerate(stages)}
    assert len(places) == 4 + 4 + 6
    for stage in stages.values():
        assert all(places[need] < places[stage.name] for need in stage.needs)


def test_stages_are_asked_for_by_name_or_by_method() -> None:
    stages = graph(read(BRANCHES))
    assert select(stages, ["last", "shards"]) == ["last", "shards"]
    assert select(stages, ["evaluate"]) == [name for name in stages if name.startswith("evaluate/")]
    assert select(stages, ["sft"]) == ["sft"]  # a stage's own name goes before its method's
    without = graph(read(BRANCHES.replace("[align.sft]", '[align.third]\nmethod = "sft"')))
    assert select(without, ["sft"]) == ["third", "second", "last", "control"]
    with pytest.raises(RunError, match=r"'dpo' is no stage of this recipe.\nIts stages: corpus, tokenizer"):
        select(stages, ["dpo"])


@pytest.mark.parametrize(
    ("text", "overrides", "to_generate", "to_chat"),
    [
        ("", (), "pretrain", "pretrain"),
        ("[align.sft]", (), "pretrain", "sft"),
        (BRANCHES, (), "pretrain", "last"),
        (BRANCHES, ("generate.model=sft",), "pretrain", "sft"),
        (BRANCHES, ("generate.model=control",), "pretrain", "control"),
        ("[align.sft]\nstart = 'there'", (), "sft", "sft"),
    ],
)
def test_the_model_that_is_meant_where_none_is_named(
    text: str, overrides: tuple[str, ...], to_generate: str, to_chat: str
) -> None:
    recipe = read(text, *overrides)
    assert default_model(recipe, to_chat=False)[0] == to_generate
    name, why = default_model(recipe, to_chat=True)
    assert name == to_chat
    assert ("[generate] model" in why) is bool(overrides)


def test_a_runs_model_is_found_by_the_same_rule(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.create(read(BRANCHES))

    def make(stage: str) -> None:
        (run.folder(stage) / "model").mkdir(parents=True)
        (run.folder(stage) / "model" / "config.json").write_text("{}")

    with pytest.raises(ArtifactError, match=r"no model here\.\nName a run"):
        find_model(tmp_path)
    for stage in ("control", "pretrain", "sft", "last"):  # the better choice each time
        make(stage)
        assert find_model(tmp_path) == tmp_path / stage / "model"
        assert find_model(tmp_path, stage="control") == tmp_path / "control" / "model"
    with pytest.raises(ArtifactError, match=r"of stage 'second'\.\nIts models: last, sft, pretrain, control\."):
        find_model(tmp_path, stage="second")


class Needy(Method):
    """A method whose own setting names another stage."""

    class Settings(AlignSettings):
        """A stage that needs another one."""

        judge: str = setting("judge", "the other one")

    settings = Settings

    def needs(self, stage: Stage) -> tuple[str, ...]:
        return (stage.settings.judge,)


@pytest.mark.parametrize("judge", ["jugde", "two"])
def test_what_a_method_needs_must_be_there_and_not_need_it_in_turn(monkeypatch: pytest.MonkeyPatch, judge: str) -> None:
    monkeypatch.setitem(METHODS, "needy", Registered(Needy(), "Needs another stage."))
    text = '[align.one]\nmethod = "needy"\n[align.two]\nmethod = "needy"\njudge = "one"\n[align.judge]\nmethod = "sft"'
    stages = graph(read(text))
    assert [name for name in stages if name in ("one", "two", "judge")] == ["judge", "one", "two"]
    assert stages["one"].needs == ("pretrain", "judge")
    with pytest.raises(RecipeError, match=rf"\[align.one\]: needs {judge}: no stage of this recipe, or one that"):
        graph(read(text, f"align.one.judge={judge}"))


# --- Without a trunk

OUTSIDE = """
[align.one]
method = "sft"
start = "{start}"

[align.two]
method = "sft"
start = "one"
"""


def test_where_every_start_is_outside_nothing_is_pretrained() -> None:
    text = OUTSIDE.format(start=finished_run().root)
    recipe = read(text)
    assert list(graph(recipe)) == ["one", "two"]
    assert graph(recipe)["one"].needs == ()
    check_recipe(recipe, "my.toml")
    asked = graph(read(text, "evaluate.tasks=groundup:tasks"))
    assert list(asked) == ["one", "two", "evaluate/before-one", "evaluate/one", "evaluate/two"]
    assert asked["evaluate/before-one"].needs == ()
    # A text is read where it is written.
    assert list(graph(read(text, "corpus.inputs=my.txt"))) == [
        *TRUNK[:3], "one", "two", "evaluate/before-one", "evaluate/one", "evaluate/two",
    ]  # fmt: skip
    assert list(graph(read(text, "pretrain.tokens=9")))[:4] == TRUNK


def test_bits_per_byte_without_a_text_are_refused() -> None:
    recipe = read(OUTSIDE.format(start=finished_run().root), "evaluate.tasks=bits_per_byte")
    assert problems_of(recipe) == [
        "[evaluate] tasks: bits_per_byte needs a validation text. Add [corpus] inputs = […]."
    ]


@pytest.mark.parametrize(
    ("start", "way_out"),
    [
        ("pretrian", "Did you mean 'pretrain'?"),
        ("secnod", "Did you mean 'second'?"),
        ("runs/none", "or a stage: second, pretrain."),
        ("x" * 5_000, "or a stage: second, pretrain."),
    ],
    ids=["trunk", "branch", "folder", "longer than a name can be"],
)
def test_a_start_that_is_nothing_is_refused_with_the_nearest_stage(start: str, way_out: str) -> None:
    recipe = read(f'[pretrain]\n[align.sft]\nstart = "{start}"\n[align.second]\nmethod = "sft"')
    (problem,) = problems_of(recipe)
    assert problem.startswith(f'[align.sft] start = "{start}": no stage of this recipe, and no model there.')
    assert way_out in problem
    alone = problems_of(read(f'[align.sft]\nstart = "{start}"'))  # now there is no trunk
    assert [one.partition(". ")[0] for one in alone] == [problem.partition(". ")[0]]


def test_a_stages_name_wins_over_a_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain", "second"):
        (tmp_path / name).mkdir()
    stages = graph(read(BRANCHES))
    assert (stages["sft"].start, stages["last"].start) == ("pretrain", "second")
    assert (stages["sft"].outside_start, stages["last"].outside_start) == (None, None)


# --- Gates


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (
            'metric = "exact_match"\nmin = 0.1',
            '"exact_match" is not measured of pretrain. Measured there: bits_per_byte',
        ),
        ('metric = "bits_per_bite"\nmax = 1', '"bits_per_bite" is not measured of pretrain.'),
        ('metric = "val_loss"\nover = "start"\nmax = 1', '"val_loss" is not measured of what pretrain starts from.'),
        ('metric = "exact_match"\nmodel = "sft"\nover = "pretrain"\nmin = 0', "exact_match"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused(gate: str, words: str) -> None:
    found = problems_of(read(f"[align.sft]\n[[evaluate.gates]]\n{gate}\n"))
    assert any(words in problem for problem in found)
    assert all(problem.startswith("[[evaluate.gates]]") for problem in found)


def test_gates_on_a_score_and_on_a_stages_own_figure_are_sound() -> None:
    gates = (
        '[[evaluate.gates]]\nmetric = "val_loss"\nmodel = "sft"\nmax = 2\n'
        '[[evaluate.gates]]\nmetric = "exact_match"\nmodel = "sft"\nover = "start"\nmin = 0.1\n'
        '[[evaluate.gates]]\nmetric = "bits_per_byte"\nmodel = "sft"\nover = "pretrain"\nmax = 0.1\n'
        '[[evaluate.gates]]\nmetric = "bits_per_byte"\nover = "start"\nmax = -1\n'
    )
    recipe = read(f'[align.sft]\n[evaluate]\ntasks = ["bits_per_byte", "groundup:tasks"]\n{gates}')
    check_recipe(recipe, "my.toml")
    assert read(recipe_toml(recipe)) == recipe
    with pytest.raises(GroundupError, match="exact_match"):
        check_recipe(read(gates.join(["[align.sft]\n", ""])), "my.toml")


def test_a_model_without_a_tokenizer_is_told_once(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished_run().root / "pretrain" / "model", tmp_path / "bare"))
    (copy / "tokenizer.json").unlink()
    (problem,) = problems_of(read(OUTSIDE.format(start=copy), "evaluate.tasks=groundup:tasks"))
    assert problem.startswith("[align.one] start")
    assert "no tokenizer beside the model" in problem
    use = f'tokenizer.use="{finished_run().root}"'
    check_recipe(read(OUTSIDE.format(start=copy), use), "my.toml")


@pytest.mark.parametrize(
    ("gate", "quick"),
    [
        ({"metric": "exact_match", "model": "sft", "min": 0.8}, {"min": 1e-6}),
        ({"metric": "exact_match", "min": 0.1, "max": 0.5}, {"min": 1e-6, "max": 0.5}),
        ({"metric": "exact_match", "max": 0.05}, {"max": 0.05}),
        ({"metric": "exact_match", "model": "sft", "over": "start", "min": 0.5}, {"over": "start", "min": 1e-6}),
        ({"metric": "bits_per_byte", "over": "start", "max": -1.5}, {"over": "start", "max": -1e-6}),
        ({"metric": "bits_per_byte", "model": "sft", "over": "pretrain", "max": 0.1}, None),
        ({"metric": "bits_per_byte", "max": 2.0}, None),
        ({"metric": "exact_match_hard", "model": "sft", "over": "start", "min": 0.1}, None),
        ({"metric": "val_loss", "model": "sft", "max": 2.0}, None),
    ],
)
def test_a_quick_run_is_asked_for_the_direction_only(gate: dict[str, object], quick: dict[str, object] | None) -> None:
    lines = "\n".join(f"{name} = {value!r}" for name, value in gate.items())
    tasks = 'tasks = ["bits_per_byte", "groundup:tasks", "groundup:hard-tasks"]'
    smoke = smoke_profile(read(f"[align.sft]\n[evaluate]\n{tasks}\n[[evaluate.gates]]\n{lines}"))
    check_recipe(smoke, "my.toml")
    assert list(smoke.align) == ["sft"]
    assert [(one.over, one.min, one.max) for one in smoke.evaluate.gates] == (
        [] if quick is None else [(quick.get("over"), quick.get("min"), quick.get("max"))]
    )


def test_a_quick_run_without_a_trunk_has_none_either() -> None:
    recipe = read(OUTSIDE.format(start=finished_run().root), "evaluate.tasks=groundup:tasks")
    smoke = smoke_profile(recipe)
    assert list(graph(smoke)) == list(graph(recipe))
    assert parse_recipe(recipe_toml(smoke), "my.toml") == smoke


def test_a_model_made_elsewhere_stands_beside_a_trunk_of_another_shape() -> None:
    start = finished_run().root / "sft"
    recipe = read(f'[model]\npreset = "ground-1m"\n[align.sft]\n[align.other]\nmethod = "sft"\nstart = "{start}"')
    check_recipe(recipe, "my.toml")
    # Its tokenizer is not the one of the shards.
    (problem,) = problems_of(recipe.model_copy(update={"align": read(
        f'[align.other]\nmethod = "sft"\nreplay = 0.5\nstart = "{start}"\n[align.sft]'
    ).align}))  # fmt: skip
    assert problem.startswith("[align.other] replay = 0.5: this recipe's shards have another tokenizer")


def test_one_start_of_several_stages_is_scored_once() -> None:
    text = f'method = "sft"\nstart = "{finished_run().root}"\n'
    stages = graph(read(f'[align.one]\n{text}[align.two]\n{text}[evaluate]\ntasks = ["groundup:tasks"]'))
    assert [name for name in stages if "/" in name] == ["evaluate/before-one", "evaluate/one", "evaluate/two"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[align.sft]\n[align.SFT]\nmethod = 'sft'", "the name is taken"),
        ("[shards]\n[align.sft]\nstart = 'x'", r"\[shards\] is about text"),
        ("[[evaluate.gates]]\nmetric = 'val_loss'\nmodel = 'start'\nmax = 1.0", "name a stage"),
        ("[[evaluate.gates]]\nmetric = 'val_loss'\nover = 'pretrain'\nmax = 1.0", "name a stage"),
    ],
)
def test_what_says_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read(text)


def test_a_command_does_every_stage_of_its_method(groundup: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "my.toml"
    path.write_text(f'[corpus]\ninputs = ["{finished_run().recipe.corpus.inputs[0]}"]\n{BRANCHES}')
    planned = groundup("sft", path, "--dry-run", "--json", "--runs", tmp_path).json["stages"]
    assert list(planned) == [*TRUNK, "sft", "second", "last", "control"]
