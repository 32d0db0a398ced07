"""The methods that learn from preferences and labels as stages of a recipe, one upon the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
from alignment_runs import records
from command import CommandLine, groundup  # noqa: F401
from tiny_run import build_quietly

from groundup.alignment import on_policy
from groundup.alignment.reward import Scorer
from groundup.errors import GroundupError
from groundup.files import read_json
from groundup.interop import load
from groundup.pipeline import plan
from groundup.preview import check_recipe, smoke_profile
from groundup.recipe import parse_recipe
from groundup.run import Run

BRANCHES = """
[align.dpo]
start = "sft"
data = ["{data}"]
batch_size = 8
lr = 1e-2
epochs = 4
eval_every = 20
lora = {{rank = 4}}

[align.more]
method = "dpo"
start = "dpo"
loss = "orpo"
data = ["{data}"]
batch_size = 8

[align.reward]
start = "sft"
data = ["{data}"]
batch_size = 8
lr = 3e-3

[align.best]
method = "rejection"
start = "sft"
examples = 200
reward = "reward"
least = -100
prompts = 40
samples = 4
max_tokens = 16
batch_size = 4

[align.best-more]
method = "sft"
start = "best"
examples = 100
epochs = 0.2

[align.best-control]
method = "sft"
start = "sft"
compute = "best"
examples = 100
batch_size = 4

[align.spam]
method = "classify"
data = ["{texts}"]
batch_size = 8

[[evaluate.gates]]
metric = "preference_accuracy"
model = "dpo"
min = 0.5

[[evaluate.gates]]
metric = "pair_accuracy"
model = "reward"
min = 0.3
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    data, texts = folder / "votes.jsonl", folder / "labels.csv"
    data.write_text("".join(json.dumps(one) + "\n" for one in [*records(), {"prompt": "a", "chosen": "b"}]))
    texts.write_text("label,text\n" + "".join(f"{'spam' if n % 3 else 'ham'},number {n}\n" for n in range(80)))
    path = tiny_run.write_recipe(folder)
    path.write_text(path.read_text() + BRANCHES.format(data=data, texts=texts))
    return path


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Run:
    return build_quietly(parse_recipe(recipe_file.read_text(), "tiny.toml"), recipe_file.parent / "run")


def test_they_are_built_scored_gated_and_shown(run: Run) -> None:
    scores = read_json(run.folder("evaluate") / "scores.json")
    language_models = {"pretrain", "sft", "dpo", "more", "best", "best-more", "best-control"}
    assert {row["model"] for row in scores["rows"]} == language_models
    assert [gate["passed"] for gate in scores["gates"]] == [True, True]
    page = (run.root / "report.html").read_text()
    for words in (
        "Preference optimization: dpo", "Reward model: reward", "Classifier: spam", "prefers the better answer",
        "correlation of score and length", "always saying the most frequent label", "ham: taken for",
    ):  # fmt: skip
        assert words in page
    manifest = run.manifest("dpo")
    assert manifest is not None
    assert manifest.summary["preferences_set_aside"] == 1
    assert (run.folder("dpo") / "adapter" / "adapter_model.safetensors").exists()
    assert not (run.folder("more") / "adapter").exists()
    assert load(run.root, stage="more").folder == run.folder("more") / "model"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert Scorer.load(run.folder("reward")).scores([talk]).isfinite().all()  # type: ignore[list-item]


def test_nothing_is_done_twice_and_damage_is_found(run: Run, recipe_file: Path) -> None:
    assert not [item.stage.name for item in plan(run.recipe, run) if item.is_due]
    changed = parse_recipe(recipe_file.read_text(), "tiny.toml", ["align.dpo.beta=0.2"])
    due = {item.stage.name for item in plan(changed, run) if item.is_due}
    assert due == {"dpo", "more", "evaluate/dpo", "evaluate/more"}


def test_a_model_that_learned_from_its_best_answers_stands_beside_the_others(run: Run, monkeypatch) -> None:
    best, control = run.manifest("best"), run.manifest("best-control")
    assert best is not None
    assert control is not None
    assert best.needs.keys() == {"sft", "reward"}
    assert best.summary["answers"] == 160
    assert 0 < best.summary["prompts_solved"] <= best.summary["answers_good"] <= 160
    one_step = control.summary["flops"] / control.summary["steps"]
    assert control.summary["flops"] == pytest.approx(best.summary["flops"], abs=one_step)
    assert "Rejection-sampling fine-tuning: best" in (run.root / "report.html").read_text()
    weights = [load(run.root, stage=name).model.embed_tokens.weight for name in ("sft", "best", "best-more")]
    assert not weights[0].equal(weights[1])
    assert not weights[1].equal(weights[2])
    monkeypatch.setattr(on_policy, "VERIFIER_VERSION", on_policy.VERIFIER_VERSION + 1)
    after = {"best", "best-more", "best-control"}
    due = {item.stage.name for item in plan(run.recipe, run) if item.is_due}
    assert due == after | {f"evaluate/{name}" for name in after}


def test_the_command_line_knows_them(run: Run, recipe_file: Path, groundup: CommandLine) -> None:  # noqa: F811
    shown = groundup("recipe", "show", recipe_file).out
    assert 'loss = "orpo"' in shown
    assert "rank = 4" in shown
    new = recipe_file.parent / "new.toml"
    assert groundup("recipe", "new", new, "--like", recipe_file, "--all").code == 0
    assert "how strongly the model is held to the reference" in new.read_text()
    assert parse_recipe(new.read_text(), "new.toml").align["dpo"].lora.rank == 4  # type: ignore[attr-defined]
    text = groundup("--help").out
    assert "A model and preferences to a reward model" in " ".join(text.split())
    assert groundup("recipe", "check", recipe_file).code == 0


def test_a_quick_version_is_quick(recipe_file: Path) -> None:
    quick = smoke_profile(parse_recipe(recipe_file.read_text(), "tiny.toml"))
    assert quick.align["dpo"].limit == 256  # type: ignore[attr-defined]
    assert quick.align["spam"].epochs == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('align.more.start="reward"', "makes no lm"),
        ('align.dpo.lora.targets="q_prok"', "Did you mean 'q_proj'"),
        ('align.dpo.data="nowhere.jsonl"', "nowhere.jsonl"),
        ('align.spam.data="nowhere.csv"', "nowhere.csv"),
        ("align.dpo.gamma=1", "not of loss"),
        ("align.dpo.batch_sise=1", "batch_size"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe_file: Path, setting: str, words: str) -> None:
    with pytest.raises(GroundupError) as error:
        check_recipe(parse_recipe(recipe_file.read_text(), "tiny.toml", [setting]), "tiny.toml")
    assert words in str(error.value)
