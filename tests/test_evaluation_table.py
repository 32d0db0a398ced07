"""The closing table: what is laid beside what, and gates that pass at their border and fail beyond it.

The models are scripted, so that every figure is known beforehand.
"""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from generation_models import random_model
from tiny_run import finished_run, mark_done
from torch import nn

from groundup.corpus import stream_documents
from groundup.errors import ArtifactError
from groundup.evaluation import bits_per_byte, compare, generate_tasks, read_comparison, score_model, verify
from groundup.evaluation import metrics as evaluation_metrics
from groundup.evaluation import sets as evaluation_sets
from groundup.evaluation.benchmarks import Item
from groundup.evaluation.measure import figures_of, measure
from groundup.evaluation.metrics import share
from groundup.evaluation.scorecard import read_scores
from groundup.files import own_folder, read_json, write_json
from groundup.interop import load_model
from groundup.model import ModelConfig, OutputLayer
from groundup.recipe import parse_recipe
from groundup.run import Run
from groundup.stage import graph, model_digest
from groundup.tokenizer import Tokenizer, render

N_TASKS, SEED = 200, 1
ALL = generate_tasks(N_TASKS, SEED)
HELD_OUT = [task for task in ALL if task.split == "held_out"]
TOKENIZER = Tokenizer.train([message["content"] for task in ALL for message in task.messages], vocab_size=320)
COMMON = sorted({token for task in ALL for token in TOKENIZER.encode(task.prompt)})
BOTH = ("bits_per_byte", "groundup:tasks")
CARD = {"format": 2, "model": "m", "tokenizer": "t", "template": None, "core": None}


class Scripted(nn.Module):
    """Goes on from known prompts with known tokens; in plain text, prefers tokens that are common there.

    It remembers what it read in the cache it is given, as a model does: one key a token, its id.
    """

    def __init__(self, replies, sharpness=0.0):
        super().__init__()
        self.config = ModelConfig(
            vocab_size=TOKENIZER.vocab_size, context_length=96, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=1,
            d_model=TOKENIZER.vocab_size, d_ff=1, position="learned",
        )  # fmt: skip
        self.compute_dtype, self.replies, self.sharpness = torch.float32, replies, sharpness
        self.weight = nn.Parameter(torch.eye(TOKENIZER.vocab_size))

    def forward(self, ids, *, positions=None, cache=None, head=None):
        hidden = torch.zeros(*ids.shape, TOKENIZER.vocab_size)
        if cache is None:
            hidden[..., COMMON] = self.sharpness
        else:
            positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
            read, _, _ = cache.update(0, ids[:, None, :, None].float(), ids[:, None, :, None].float(), positions)
            for row, places in enumerate(positions.tolist()):
                for column, place in enumerate(places):
                    hidden[row, column, self.next_token(read[row, 0, : place + 1, 0].long().tolist())] = 1.0
        return hidden if head is None else head(hidden, OutputLayer(self, self.config.vocab_size))

    def next_token(self, read):
        if TOKENIZER.role_id("assistant") not in read:
            return TOKENIZER.pad_id
        border = read.index(TOKENIZER.role_id("assistant")) + 1
        reply = self.replies.get(tuple(read[:border]), [TOKENIZER.pad_id])
        place = len(read) - border
        return reply[place] if place < len(reply) else TOKENIZER.end_id


def knowing(tasks, style=None, **options):
    """A model that answers these tasks rightly, in one style or in each one's own, and all others wrongly."""
    replies = {}
    for task in tasks:
        prompt = render(TOKENIZER, task.messages[:1], add_generation_prompt=True).ids
        answer = task.say(task.answer, style or task.style)
        replies[tuple(prompt)] = [*TOKENIZER.encode(answer), TOKENIZER.end_id]
    return Scripted(replies, **options)


TEXTS = [" ".join(task.prompt for task in ALL[place : place + 3]) for place in range(0, 90, 3)]


def kept(root, recipe, **models):
    """A run in which these models are scored, by the names of their stages."""
    run = Run(root)
    for name, model in models.items():
        place = name.replace("_", "-")
        if f"evaluate/{place}" not in graph(recipe):
            continue
        tasks = ("bits_per_byte",) if place == "before-pretrain" else recipe.evaluate.tasks
        settings = recipe.evaluate.model_copy(update={"tasks": tasks})
        mark_done(recipe, run, {f"evaluate/{place}": {}})
        score_model(model, TOKENIZER, settings, texts=TEXTS, seed=SEED, folder=run.folder(f"evaluate/{place}"))
    return run


def read(text="", tasks=BOTH, gates=""):
    return parse_recipe(f"{text}\n[evaluate]\ntasks = {list(tasks)}\n{gates}", "my.toml")


def gate(metric, **said):
    lines = [f"{name} = {value!r}" for name, value in {"metric": metric, **said}.items()]
    return "\n".join(["[[evaluate.gates]]", *lines, ""])


def figure(run, name, metric):
    return read_json(run.folder(f"evaluate/{name}") / "scores.json")["tasks"][metric]["figures"][metric]["value"]


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    monkeypatch.setattr(evaluation_sets, "_N_TASKS", N_TASKS)


def exact_match(model, tasks):
    """The share of right answers, which are right, and the replies."""
    items = [Item(n, task.kind, task.prompt, target=task.answer, row={"asked": task}) for n, task in enumerate(tasks)]
    records = measure(model, TOKENIZER, evaluation_sets.GeneratedSet("groundup:tasks"), items)
    rights = [record["outcomes"]["exact_match"] for record in records]
    return figures_of(records)["exact_match"], rights, [record["reply"] for record in records]


@pytest.mark.parametrize("style", ["plain", "polite", None])
def test_perfect_answers_of_every_kind_are_all_right(style):
    estimate, _, replies = exact_match(knowing(ALL, style), ALL)
    assert (estimate.value, estimate.n) == (1.0, len(ALL))
    assert all(verify(task, reply) for task, reply in zip(ALL, replies, strict=True))


def test_a_model_that_knows_some_answers_is_credited_with_these():
    estimate, rights, _ = exact_match(knowing(ALL[::3]), ALL)
    assert rights == [place % 3 == 0 for place in range(len(ALL))]
    assert estimate.value == pytest.approx(len(ALL[::3]) / len(ALL))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_how_many_windows_or_prompts_are_computed_at_once_changes_nothing(rows, monkeypatch):
    model = random_model(vocab_size=TOKENIZER.vocab_size)
    bits, graded = bits_per_byte(model, TEXTS, TOKENIZER), exact_match(knowing(ALL[::2]), ALL[:40])
    monkeypatch.setattr(evaluation_metrics, "_ROWS", rows)
    monkeypatch.setattr("groundup.generation.text._SLOTS", rows)
    again = bits_per_byte(model, TEXTS, TOKENIZER)
    assert again.n == bits.n
    assert (again.value, again.stderr) == pytest.approx((bits.value, bits.stderr), rel=1e-5)
    assert exact_match(knowing(ALL[::2]), ALL[:40]) == graded


def test_rows_of_the_whole_pipeline(tmp_path):
    recipe, n_known = read("[align.sft]"), len(HELD_OUT) // 2
    initial, base = Scripted({}), Scripted({}, 3.0)
    assistant = knowing(HELD_OUT[:n_known], sharpness=1.0)
    run = kept(tmp_path, recipe, before_pretrain=initial, pretrain=base, sft=assistant)
    found = compare(recipe, run)
    bits, after_sft, answers = found["rows"]
    assert [(row["model"], row["key"]) for row in found["rows"]] == [
        ("pretrain", "bits_per_byte"), ("sft", "bits_per_byte"), ("sft", "exact_match"),
    ]  # fmt: skip
    assert bits["before"] == asdict(bits_per_byte(initial, TEXTS, TOKENIZER))
    assert bits["before"]["n"] == bits["after"]["n"] == len("".join(TEXTS).encode())
    assert after_sft["before"] == bits["after"]
    assert after_sft["after"]["value"] > bits["after"]["value"]
    assert answers["before"] == asdict(share([False] * len(HELD_OUT)))
    assert answers["after"]["value"] == pytest.approx(n_known / len(HELD_OUT))
    assert [row["after"]["unit"] for row in found["rows"]] == ["bytes", "bytes", "prompts"]
    assert found["gates"] == []
    assert found["model"] == "sft"
    assert set(found["by_kind"]) == {task.kind for task in HELD_OUT}
    known = sum(kind["after"]["value"] * kind["after"]["n"] for kind in found["by_kind"].values())
    assert known == pytest.approx(n_known)
    assert all(kind["before"]["value"] == 0 for kind in found["by_kind"].values())
    correct = [answer["correct"] for answer in found["answers"]]
    assert correct == [place < n_known for place in range(len(HELD_OUT))]


def test_rows_without_an_assistant(tmp_path):
    models = {"before_pretrain": Scripted({}), "pretrain": knowing(HELD_OUT, sharpness=3.0)}
    for tasks in (BOTH, ("bits_per_byte",), ("groundup:tasks",)):
        recipe = read(tasks=tasks)
        # An untrained model is scored on text only.
        run = kept(tmp_path / str(len(tasks)) / tasks[0], recipe, **models)
        rows = {row["key"]: row for row in compare(recipe, run)["rows"]}
        assert list(rows) == [
            {"bits_per_byte": "bits_per_byte", "groundup:tasks": "exact_match"}[task] for task in tasks
        ]
        if "exact_match" in rows:
            assert (rows["exact_match"]["before"], rows["exact_match"]["after"]["value"]) == (None, 1.0)


def test_each_branch_stands_beside_what_it_started_from(tmp_path):
    recipe = read(
        '[align.one]\nmethod = "sft"\n[align.two]\nmethod = "sft"\nstart = "one"\n'
        '[align.control]\nmethod = "sft"\nstart = "one"\ncompute = "two"',
        ("groundup:tasks",),
    )
    four = HELD_OUT[:4]
    models = {"pretrain": 0, "one": 1, "two": 3, "control": 2}
    run = kept(tmp_path, recipe, **{name: knowing(four[:n]) for name, n in models.items()})
    found = compare(recipe, run)
    n = len(HELD_OUT)
    assert {row["label"]: (row["before"]["value"] * n, row["after"]["value"] * n) for row in found["rows"]} == {
        "exact match, one": (0, 1), "exact match, two": (1, 3), "exact match, control (control)": (1, 2),
    }  # fmt: skip
    assert found["model"] == "two"  # the last that is no control
    # What is not built yet is left out.
    shutil.rmtree(run.folder("evaluate/control"))
    assert len(compare(recipe, run)["rows"]) == 2


def test_a_model_made_elsewhere_is_the_start_it_was(tmp_path):
    recipe = read('[align.sft]\nstart = "there"', ("groundup:tasks",))
    run = Run(tmp_path)
    for name, right in (("before-sft", [True, False]), ("sft", [True, True])):
        mark_done(recipe, run, {f"evaluate/{name}": {}})
        records = [{"item": n, "outcomes": {"exact_match": one}, "group": "", "prompt": "", "reply": ""}
                   for n, one in enumerate(right)]  # fmt: skip
        one = {"figures": {"exact_match": asdict(share(right))}, "groups": {}, "identity": "x", "fingerprint": "x"}
        folder = run.folder(f"evaluate/{name}")
        write_json(folder / "scores.json", {**CARD, "tasks": {"groundup:tasks": one}})
        lines = map(json.dumps, [{"identity": "x"}, *records])
        (folder / "groundup-tasks.jsonl").write_text("\n".join(lines))
    (row,) = compare(recipe, run)["rows"]
    assert (row["before"]["value"], row["after"]["value"]) == (0.5, 1.0)
    assert [answer["correct"] for answer in compare(recipe, run)["answers"]] == [True, True]
    # Scores stand without the answers.
    for damaged in ('{"identity": "x"}\n{"item": 0, "outcomes": 3}', "", None):
        path = run.folder("evaluate/sft") / "groundup-tasks.jsonl"
        path.unlink() if damaged is None else path.write_text(damaged)
        found = compare(recipe, run)
        assert (found["answers"], len(found["rows"])) == ([], 1)


def test_the_gate_on_bits_passes_at_its_border_and_fails_beyond(tmp_path):
    recipe = read(tasks=("bits_per_byte",))
    run = kept(tmp_path, recipe, before_pretrain=Scripted({}), pretrain=Scripted({}, sharpness=3.0))
    change = figure(run, "pretrain", "bits_per_byte") - figure(run, "before-pretrain", "bits_per_byte")
    assert change < -0.5
    for most, passes in [(0.0, True), (change, True), (math.nextafter(change, -9), False), (change - 1, False)]:
        judged = read(tasks=("bits_per_byte",), gates=gate("bits_per_byte", over="start", max=most))
        (found,) = compare(judged, run)["gates"]
        assert (found["passed"], found["value"]) == (passes, change)
        said = f"bits per byte of pretrain over what it started from: at most {most:g}, is {change:.4g}"
        assert found["text"] == said


@pytest.mark.parametrize(
    ("gates", "passes"),
    [
        ([{"model": "sft", "min": 0.5}], [True]),
        ([{"model": "sft", "min": 0.500001}], [False]),
        ([{"max": 0.25}], [True]),
        ([{"max": 0.249999}], [False]),
        ([{"max": 0.25}, {"model": "sft", "min": 0.5}], [True, True]),
        ([{"max": 0.0}, {"model": "sft", "min": 0.5}], [False, True]),
        ([{"model": "sft", "over": "pretrain", "min": 0.25}], [True]),
        ([{"model": "sft", "over": "start", "min": 0.250001}], [False]),
        ([{"model": "pretrain", "over": "sft", "min": -0.25, "max": -0.25}], [True]),
        ([{"model": "sft", "min": 0.4, "max": 0.49}], [False]),
    ],
)
def test_the_gates_on_answers_pass_at_their_border_and_fail_beyond(gates, passes, tmp_path):
    tasks, four = ("groundup:tasks",), HELD_OUT[:4]
    text = "".join(gate("exact_match", **said) for said in gates)
    recipe = read("[align.sft]", tasks, f"limit = 4\n{text}")
    run = kept(tmp_path, recipe, pretrain=knowing(four[:1]), sft=knowing(four[:2]))
    found = compare(recipe, run)["gates"]
    assert [judged["passed"] for judged in found] == passes
    for judged, said in zip(found, gates, strict=True):
        assert ("at least" in judged["text"]) is ("min" in said)
        assert ("at most" in judged["text"]) is ("max" in said)


def test_a_gate_may_be_on_a_figure_of_the_stages_own(tmp_path):
    own = gate("val_loss", model="sft", max=1.5)
    recipe, run = read("[align.sft]", (), own), Run(tmp_path)
    (waiting,) = compare(recipe, run)["gates"]
    assert (waiting["passed"], waiting["text"]) == (None, "val_loss of sft: at most 1.5")
    for loss, passes, words in ((None, False, "was not measured"), (1.5, True, "is 1.5"), (1.6, False, "is 1.6")):
        mark_done(recipe, run, {"sft": {"val_loss": loss}})
        (found,) = compare(recipe, run)["gates"]
        assert found["passed"] is passes
        assert found["text"] == f"val_loss of sft: at most 1.5, {words}"
    (stale,) = compare(read("[align.sft]\nepochs = 2.0", (), own), run)["gates"]
    assert stale["passed"] is None


def test_a_runs_table_says_what_its_models_score(monkeypatch):
    monkeypatch.setattr(evaluation_sets, "_N_TASKS", 10_000)
    run = finished_run()
    found = read_comparison(run)
    texts = [document.text for document in stream_documents(run.folder("corpus"), "validation")]
    rows = {(row["model"], row["key"]): row for row in found["rows"]}
    assert found == compare(run.recipe, run)
    for name in ("pretrain", "sft"):
        model, tokenizer = load_model(run.folder(name) / "model")
        bits = bits_per_byte(model, texts, tokenizer)
        assert rows[name, "bits_per_byte"]["after"]["value"] == pytest.approx(bits.value, rel=1e-6)
    scored = score_model(model, tokenizer, run.recipe.evaluate, texts=texts, seed=run.recipe.seed)
    assert rows["sft", "exact_match"]["after"] == scored.figures["exact_match"]
    records = scored.records["groundup:tasks"]
    assert [answer["reply"] for answer in found["answers"]] == [record["reply"] for record in records]
    assert [answer["correct"] for answer in found["answers"]] == [
        record["outcomes"]["exact_match"] for record in records
    ]
    card = read_json(run.folder("evaluate/sft") / "scores.json")
    assert card["tokenizer"] == tokenizer.fingerprint
    assert card["model"] == model_digest(run.folder("sft") / "model")
    assert card["tasks"].keys() == {"bits_per_byte", "groundup:tasks"}
    # Wall-clock figures are kept out of the scores, which must be the same on every run.
    assert "tokens_per_second" not in json.dumps(found)
    assert run.manifest("evaluate/sft").summary["generation_tokens_per_second"] > 0


@pytest.mark.parametrize(
    "damage",
    [
        {"tasks": []}, {"tasks": {"bits_per_byte": {}}}, {"tasks": {"a": {"figures": {"b": 2.0}}}}, {"core": {}},
        {"tasks": {"a": {"figures": {"b": {"value": True}}, "groups": {}, "identity": "x", "fingerprint": "x"}}},
        {"format": 1}, {"format": None},
    ],
)  # fmt: skip
def test_damaged_scores_and_those_of_another_version_count_as_none(tmp_path, damage):
    figures = {"bits_per_byte": {"value": 2.0, "stderr": 0.1, "n": 9, "unit": "bytes"}}
    one = {"figures": figures, "groups": {}, "identity": "x", "fingerprint": "x"}
    whole = {**CARD, "tasks": {"bits_per_byte": one}}
    write_json(tmp_path / "scores.json", whole)
    assert read_scores(tmp_path) == whole
    write_json(tmp_path / "scores.json", {**whole, **damage})
    assert read_scores(tmp_path) == {}


def test_scores_as_versions_before_wrote_them_are_made_again(tmp_path):
    earlier = {"figures": {"bits_per_byte": {"value": 2.0, "stderr": 0.1}}, "by_kind": {}, "answers": []}
    write_json(tmp_path / "scores.json", earlier)
    assert read_scores(tmp_path) == {}


def test_a_damaged_table_of_scores_is_named(tmp_path):
    own_folder(tmp_path / "evaluate")
    write_json(tmp_path / "evaluate" / "scores.json", [1])
    with pytest.raises(ArtifactError, match=r"scores\.json: is no table"):
        read_comparison(Run(tmp_path))
