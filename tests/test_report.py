"""The report: one page, no network, nothing from a text gets out of its place, whatever is missing."""

import io
import itertools
import json
import math
import random
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from groundup.errors import RunError
from groundup.files import own_folder, write_json
from groundup.recipe import parse_recipe, read_recipe
from groundup.report.charts import curve_chart, histogram_chart
from groundup.report.closing import closing_table
from groundup.report.page import write_report
from groundup.run import Manifest, Run
from groundup.stage import graph

ADVERSARIAL = '<script>alert("x")</script><img src=https://evil.example/x onerror=alert(1)>'
ENVIRONMENT = {
    "groundup": "0.1.0",
    "python": "3.11.9",
    "torch": "2.11.0",
    "platform": "Linux-6.8-x86_64",
    "cpu": "Some Processor 9000",
    "cores": 2,
    "threads": 2,
    "memory_gib": 7.8,
}
LEARNT = [
    (0, "ttttt e  aq;he,,e a oin\ufffd Tthe sX  he"),
    (45, " the the and the of the, and he wat the soo"),
    (150, " and the was the little of the bear, and said the man to the"),
    (400, " there was a little girl who said to the Wolf, and the Fox was very"),
    (735, ", there was a poor woodcutter, and he had a little house in the forest. “I will go,” said the Lion."),
]
KINDS = ("first word", "last word", "repeat", "count words", "opposite", "capital", "larger", "sort digits", "reverse")
SCORES = {
    "rows": [
        {
            "key": "bits_per_byte",
            "model": "pretrain",
            "label": "bits/byte, pretrain",
            "before": {"value": 7.9, "stderr": 0.01, "n": 51_234, "unit": "bytes"},
            "after": {"value": 2.31, "stderr": 0.02, "n": 51_234, "unit": "bytes"},
        },
        {
            "key": "exact_match",
            "model": "sft",
            "label": "exact match, sft",
            "before": {"value": 0.0, "stderr": 0.0, "n": 450, "unit": "prompts"},
            "after": {"value": 0.912, "stderr": 0.0133, "n": 450, "unit": "prompts"},
        },
        {
            "key": "bits_per_byte",
            "model": "sft",
            "label": "bits/byte, sft",
            "before": {"value": 2.31, "stderr": 0.02, "n": 51_234, "unit": "bytes"},
            "after": {"value": 2.56, "stderr": 0.03, "n": 51_234, "unit": "bytes"},
        },
    ],
    "gates": [
        {
            "key": "bits_per_byte",
            "model": "pretrain",
            "over": "start",
            "value": -1.7,
            "bounds": "at most -1.5 over start",
            "passed": True,
        },
        {
            "key": "exact_match",
            "model": "sft",
            "over": None,
            "value": 0.912,
            "measured_by": ["evaluate/sft"],
            "bounds": "at least 0.8",
            "passed": True,
        },
        {"key": "val_loss", "model": "sft", "over": None, "value": 0.0918, "bounds": "at most 1", "passed": True},
    ],
    "model": "sft",
    "by_kind": {
        kind: {
            "before": {"value": 0.01 * (index % 3), "stderr": 0.01, "n": 50},
            "after": {"value": 1 - 0.035 * index, "stderr": 0.005 + 0.008 * index, "n": 50},
        }
        for index, kind in enumerate(KINDS)
    },
    "answers": [
        {"kind": kind, "prompt": prompt, "expected": expected, "reply": reply, "correct": reply == expected}
        for kind, prompt, expected, reply in (
            ("opposite", "What is the opposite of hot?", "cold", "cold"),
            ("sort digits", "Sort these digits: 7 2 5", "2 5 7", "2 5 7"),
            ("reverse", "Reverse these digits: 4 8 1", "1 8 4", "1 4 8"),
            ("capital", "What is the capital of France?", "It is Paris.", "It is Paris."),
            ("count words", "How many words are in: the old grey goose?", "4", "4"),
            ("first word", "Give the first word of: lion bear fox", "lion", "lion"),
        )
    ],
}


def lines(path: Path, values: list[dict]) -> None:
    own_folder(path.parent)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def done(run: Run, stage: str, seconds: float, summary: dict) -> None:
    own_folder(run.folder(stage))
    if stage.startswith("evaluate/"):
        write_json(run.folder(stage) / "scores.json", {"format": 2, "tasks": {}, "core": None})
    known = graph(run.recipe)[stage]
    shown = asdict(known.method.shown(known, summary))
    settings = {
        key: value for section in known.method.sections(known) for key, value in section.model_dump(mode="json").items()
    }
    needs = dict.fromkeys(known.needs, "f" * 32)
    run.finish(Manifest(stage, "f" * 32, seconds, summary, ENVIRONMENT, settings, shown, needs, known.identity))


def train(
    run: Run, stage: str, steps: int, start: float, end: float, samples: list[dict], bytes_per_token: float
) -> None:
    """The logs of a training stage: a power law with noise."""
    noise = random.Random(stage)
    power = math.log(start / end) / math.log(steps)
    loss = [start * step**-power for step in range(1, steps + 1)]
    every = max(1, steps // 20)
    logged = []
    for step in range(1, steps + 1):
        lr = 0.003 * min(1.0, step / (0.03 * steps), (steps - step) / (0.6 * steps))
        noisy = loss[step - 1] * (1 if step == 1 else noise.gauss(1, 0.03))
        logged.append({"step": step, "tokens": 4096 * step, "loss": noisy, "lr": lr, "grad_norm": 0.8})
        if step % every == 0 or step == steps:
            value = loss[step - 1] * 1.02
            line = {"step": step, "tokens": 4096 * step, "val_loss": value}
            if stage == "pretrain":
                line["val_bits_per_byte"] = value / math.log(2) / bytes_per_token
            logged.append(line)
    lines(run.folder(stage) / "metrics.jsonl", logged)
    speeds = [
        {"step": step, "seconds": step * 0.107, "tokens_per_second": 38_000 * noise.gauss(1, 0.02)}
        for step in range(10, steps + 1, 10)
    ]
    lines(run.folder(stage) / "timings.jsonl", speeds)
    lines(run.folder(stage) / "samples.jsonl", samples)


def training_summary(steps: int, start: float, end: float) -> dict:
    return {
        "parameters": 1_049_344,
        "steps": steps,
        "tokens": steps * 4096,
        "initial_loss": start,
        "expected_initial_loss": math.log(2048),
        "final_loss": end,
        "val_loss": end * 1.02,
        "precision": "bfloat16",
        "tokens_per_second": 38_120.4,
        "peak_memory_bytes": 912 << 20,
    }


RECIPE = """
name = "demo"

[corpus]
inputs = ["groundup:classics"]

[tokenizer]
vocab_size = 2_048

[model]
preset         = "ground-1m"
context_length = 256

[pretrain]
tokens  = 3_000_000
samples = ["Once upon a time", "The Wizard said"]

[align.sft]
data = ["groundup:tasks"]

[evaluate]
tasks = ["bits_per_byte", "groundup:tasks"]
"""


def fake_run(root: Path, *, prompt: str = "Once upon a time", source: str = "groundup:classics") -> Run:
    """A finished demo, as its stages would leave it."""
    run = Run(root)
    run.create(parse_recipe(RECIPE, "demo"))
    examples = {
        "invalid JSON": [("line 15", "the line ends in the middle", '{"text": "The Ant and the Grasshop')],
        "language": [
            ("line 12", "most probable: la (0.93)", "Gallia est omnis divisa in partes tres, quarum unam"),
            ("line 13", "most probable: fr (0.99)", "Il était une fois une petite fille de village"),
        ],
        "duplicate": [("line 14", "same text as line 3", "A hungry Fox saw some fine bunches of Grapes hanging")],
    }
    statistics = {
        "steps": [
            {"step": "read", "in": 420, "out": 419, "removed": {"invalid JSON": 1}},
            {"step": "short", "in": 419, "out": 419, "removed": {}},
            {"step": "language", "in": 419, "out": 410, "removed": {"language": 9}},
            {"step": "duplicate", "in": 410, "out": 405, "removed": {"duplicate": 5}},
        ],
        "languages": {"en": 410, "fr": 5, "la": 4},
        "files": {"read": 1, "passed_over": 0, "names": []},
        "examples": {
            reason: [
                {
                    "source": source,
                    "record": record,
                    "reason": reason,
                    "detail": detail,
                    "bytes": 90,
                    "excerpt": excerpt,
                }
                for record, detail, excerpt in found
            ]
            for reason, found in examples.items()
        },
    }
    own_folder(run.folder("corpus"))
    write_json(run.folder("corpus") / "filter_statistics.json", statistics)
    done(
        run,
        "corpus",
        2.1,
        {
            "documents_in": 420,
            "documents_kept": 405,
            "documents_train": 364,
            "documents_validation": 41,
            "bytes_in": 1_812_000,
            "bytes_kept": 1_731_000,
            "characters_kept": 1_700_000,
            "removed": {"language": 9, "duplicate": 5, "invalid JSON": 1},
            "validation_by": "document",
        },
    )
    done(
        run, "tokenizer", 1.04, {"kind": "bpe", "vocab_size": 2048, "bytes_per_token": 3.402, "longest": [" something"]}
    )
    done(
        run,
        "shards",
        0.61,
        {"tokens_train": 478_211, "tokens_validation": 51_020, "bytes_per_token": 3.402, "dtype": "uint16", "files": 2},
    )
    learnt = [
        {"step": step, "prompt": start, "text": text} for step, text in LEARNT for start in (prompt, "The Wizard said")
    ]
    train(run, "pretrain", 735, 7.63, 3.02, learnt, 3.402)
    summary = training_summary(735, 7.63, 3.02)
    done(run, "pretrain", 78.6, {**summary, "val_bits_per_byte": 3.08 / math.log(2) / 3.402})
    train(run, "sft", 420, 4.4, 0.09, [{"step": 400, "prompt": "What is the opposite of hot?", "text": "cold"}], 3.402)
    conversations = {"conversations_train": 9_012, "conversations_held_out": 988, "supervised_tokens": 41_200}
    done(run, "sft", 96.2, {**training_summary(420, 4.4, 0.09), "expected_initial_loss": None, **conversations})
    own_folder(run.folder("evaluate"))
    write_json(run.folder("evaluate") / "scores.json", SCORES)
    done(run, "evaluate/before-pretrain", 1.1, {"bits_per_byte": 7.9})
    done(run, "evaluate/pretrain", 10.1, {"bits_per_byte": 2.31, "exact_match": 0.0})
    done(
        run, "evaluate/sft", 10.2, {"bits_per_byte": 2.56, "exact_match": 0.912, "generation_tokens_per_second": 1204.6}
    )
    return run


class Page(HTMLParser):
    """What a browser would make of the page."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(write_report(fake_run(tmp_path_factory.mktemp("runs") / "demo")))


def test_page_is_one_small_well_formed_file(page):
    assert page.open == []
    assert page.source.startswith("<!DOCTYPE html>")
    assert len(page.source.encode()) < 1_500_000


def assert_harmless(page):
    """No script, no handler, and nothing that a browser would fetch."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "embed", "base", "form", "a")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "data", "action", "poster"), (tag, name)
            if name.endswith("href"):
                assert (value or "").startswith("#"), (tag, value)
    styles = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "@import" not in styles
    assert "url(" not in styles
    policies = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_page_needs_no_network(page):
    assert_harmless(page)
    assert "http:" not in page.source
    assert "https:" not in page.source


def test_page_tells_the_run(page):
    told = " ".join(page.text.split())
    assert "Bits/byte, pretrain 7.90 → 2.31; exact match, sft 0.0% → 91.2%; every gate passed." in told
    for expected in (
        "405 kept",
        "2,048 entries",
        "0.48 M tokens",
        "1.05 M weights",
        "1:19 min",
        "3.01 M tokens",
        "2.56 bits/byte",
    ):
        assert expected in told, expected
    for expected in (
        "Once upon a time",
        "a poor woodcutter",
        "Gallia est omnis divisa",
        "9 language",
        "Some Processor 9000",
    ):
        assert expected in told, expected
    for expected in ("±0.02", "51 k bytes", "±1.3", "450 prompts", "38,120", "at most -1.5 over start"):
        assert expected in told, expected
    assert 'inputs = ["groundup:classics"]' in told
    assert "groundup chat" in told


def test_accessible_names_headings_and_scopes(page):
    assert len(page.named("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.named("html")[0]["lang"] == "en"
    assert all(cell.get("scope") in ("row", "col") for cell in page.named("th"))
    figures = page.named("figure")
    assert len(figures) == 6
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 40 for figure in figures)
    assert all(svg["aria-hidden"] == "true" for svg in page.named("svg"))


def test_ids_are_unique_and_every_reference_resolves(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [value[1:] for _, found in page.tags for name, value in found.items() if name.endswith("href")]
    assert references
    assert set(references) <= set(ids)
    labels = {found["aria-labelledby"] for _, found in page.tags if "aria-labelledby" in found}
    assert labels <= set(ids)


def test_same_run_gives_the_same_bytes(page, tmp_path):
    again = write_report(fake_run(tmp_path / "demo"))
    there = page.source[page.source.index("<h2") : page.source.index('id="on"')]
    assert there in again.read_text(encoding="utf-8")


def test_texts_stay_texts(tmp_path):
    run = fake_run(tmp_path / "hostile", prompt=ADVERSARIAL, source=ADVERSARIAL)
    scores = json.loads(json.dumps(SCORES))
    scores["rows"][0]["label"] = ADVERSARIAL
    scores["gates"][0]["bounds"] = ADVERSARIAL
    scores["by_kind"][f"{ADVERSARIAL} $x^2$ ]]> -->"] = scores["by_kind"].pop("capital")
    hostile = {
        "kind": ADVERSARIAL,
        "prompt": ADVERSARIAL,
        "reply": ADVERSARIAL,
        "expected": ADVERSARIAL,
        "correct": False,
    }
    scores["answers"].append(hostile)
    write_json(run.folder("evaluate") / "scores.json", scores)
    done(
        run,
        "corpus",
        1.0,
        {"documents_in": 2, "documents_kept": 1, "removed": {ADVERSARIAL: 1}, "validation_by": ADVERSARIAL},
    )
    recipe = run.root / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("children", ADVERSARIAL.replace('"', "'")) + f"# {ADVERSARIAL}\n")
    page = Page(write_report(run))
    assert page.open == []
    assert_harmless(page)
    assert page.text.count(ADVERSARIAL) >= 13


def test_bytes_that_are_no_characters_are_shown(tmp_path):
    run = fake_run(tmp_path / "odd")
    samples = [{"step": 1, "prompt": "a\x00b", "text": "half \ud83d and \x1b[31mred"}]
    lines(run.folder("pretrain") / "samples.jsonl", samples)
    told = Page(write_report(run)).text
    assert "a␀b" in told
    assert "half ? and ␛[31mred" in told


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [
        ((), "0 of 8 stages are done; next is corpus"),
        (("corpus", "tokenizer", "shards"), "3 of 8 stages are done; next is pretrain"),
        (("corpus", "tokenizer", "shards", "pretrain", "sft"), "5 of 8 stages are done; next is evaluate/before-"),
    ],
)
def test_unfinished_run_shows_what_is_there(tmp_path, kept, verdict):
    run = fake_run(tmp_path / "part")
    for stage in ("corpus", "tokenizer", "shards", "pretrain", "sft", "evaluate"):
        if stage not in kept:
            run.forget(stage)
    page = Page(write_report(run))
    assert verdict in " ".join(page.text.split())
    assert ("groundup chat" in page.text) == ("sft" in kept)
    assert ("Before and after" in page.text) == ("evaluate" in kept)
    assert ("405 kept" in page.text) == ("corpus" in kept)


def test_interrupted_pretraining_shows_its_curve_so_far(tmp_path):
    run = fake_run(tmp_path / "part")
    run.forget("sft")
    run.forget("evaluate")
    folder = run.folder("pretrain")
    (folder / "stage.json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:312]) + '{"step": 301, "lo')
    page = Page(write_report(run))
    assert "Not finished: the figures end at step 3" in page.text
    assert any("Training loss falls" in (figure.get("aria-label") or "") for figure in page.named("figure"))
    assert "damaged" not in page.text


def test_interrupted_reinforcement_learning_says_where_its_figures_end(tmp_path):
    run = fake_run(tmp_path / "part")
    run.forget("evaluate")
    (run.folder("sft") / "stage.json").unlink()
    lines(run.folder("sft") / "metrics.jsonl", [{"step": step, "policy": 0.1, "reward": 0.5} for step in (1, 7)])
    assert "Not finished: the figures end at step 7" in Page(write_report(run)).text


def test_single_step_and_overflowed_losses(tmp_path):
    run = fake_run(tmp_path / "short")
    first = {"step": 1, "tokens": 10, "loss": 7.6, "lr": 0.0, "grad_norm": 1.0}
    lines(run.folder("pretrain") / "metrics.jsonl", [first, {**first, "step": 2, "loss": None}])
    lines(run.folder("sft") / "metrics.jsonl", [{"step": 1, "loss": float("nan"), "lr": 0.1}])
    lines(run.folder("pretrain") / "timings.jsonl", [{"step": 1, "seconds": 0.0, "tokens_per_second": 10.0}])
    assert "7.60 at step 1" in Page(write_report(run)).source


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run = fake_run(tmp_path / "torn")
    (run.folder("evaluate") / "scores.json").write_text('{"rows": [')
    (run.folder("tokenizer") / "stage.json").write_text("not json")
    (run.root / "recipe.toml").write_text("name = [")
    (run.folder("pretrain") / "samples.jsonl").write_text("[" * 9_999 + '\n{"st\n{"step": 1%s}\nnull' % ("0" * 400))
    page = Page(write_report(run))
    assert "evaluate/scores.json is damaged" in page.text
    assert "tokenizer/stage.json is damaged" in page.text
    assert "The recipe cannot be read" in page.text
    assert "pretrain/samples.jsonl: 2 lines are damaged" in page.text
    assert "405 kept" in page.text


def test_long_logs_stay_small_and_keep_their_spikes(tmp_path):
    run = fake_run(tmp_path / "long")
    steps = 40_000
    logged = [{"step": step, "loss": 3.0, "lr": 0.003} for step in range(1, steps + 1)]
    logged[31_337]["loss"] = 9.0
    lines(run.folder("pretrain") / "metrics.jsonl", logged)
    source = write_report(run).read_text(encoding="utf-8")
    assert len(source.encode()) < 1_500_000
    heights = blue_heights(source, "pretrain-loss-wide")
    # 9.0 and 3.0 on an axis from 2.46 to 9.81, some 280 pixels high.
    assert max(heights) - min(heights) > 200


def blue_heights(source: str, name: str) -> list[float]:
    """The y coordinates of a plot's training curve, as drawn at each step."""
    start = source.rindex("<svg", 0, source.index(f'id="{name}'))
    plot = source[start : source.index("</svg>", start)]
    drawn = [tag.split("/>")[0] for tag in plot.split("<path ")[1:]]
    path = next(tag for tag in drawn if "stroke: var(--blue)" in tag and "stroke-opacity" in tag)
    numbers = path.split('d="')[1].split('"')[0]
    return [float(number) for number in numbers.replace("M", " ").replace("L", " ").split()[1::2]]


def test_where_a_held_out_score_stops_to_follow_the_reward_is_marked():
    lines = [{"step": step, "reward": step / 10, "kl": step**2} for step in range(1, 41)]
    for line, score in zip(lines[4::5], (0.5, 0.7, 0.9, 0.9, 0.8, 0.6, 0.4, 0.3), strict=True):
        line["held_out_right"] = score
    chart = curve_chart("ppo", ["reward", "held_out_right", "kl"], lines)
    assert "Its best: 0.9 at step 20." in chart.words
    assert "reward: from 0.1 at step 1 to 3.95 at step 40." in chart.words
    for drawn in (chart.wide, chart.narrow):
        assert drawn.count("best: step 20") == 1
        assert all(f">{key}<" in drawn for key in ("reward", "held out right", "kl"))
    alone = curve_chart("ppo", ["held_out_right"], lines)
    assert "best" not in alone.words + alone.wide  # beside nothing that could go on rising


def test_signals_of_documents_are_drawn_with_the_threshold_that_cuts_them():
    found = {"counts": [1, 4, 9], "edges": [0, 1, 2, 3], "rule": "too_short", "least": 1}
    chart = histogram_chart("signals", {"words": found, "lines": {**found, "edges": [0, 10, 1000, 10_000]}})
    assert chart.words == "Signals of all documents: words, too_short at 1; lines, too_short at 1"
    for drawn in (chart.wide, chart.narrow):
        assert drawn.count("fill: var(--blue)") == 6
        assert drawn.count("stroke: var(--orange)") == 2
        assert all(f">{words}<" in drawn for words in ("words", "lines", "10 k"))


def test_recipe_without_sft_offers_no_chat(tmp_path):
    run = Run(tmp_path / "shakespeare")
    run.create(read_recipe("shakespeare"))
    train(run, "pretrain", 50, 4.17, 1.5, [], 1.0)
    done(run, "pretrain", 170.0, training_summary(50, 4.17, 1.5))
    page = Page(write_report(run))
    assert "groundup chat" not in page.text
    assert "groundup generate" in page.text
    assert "sft" not in page.text.split("The recipe")[0]


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match="no run in this folder"):
        write_report(Run(tmp_path))


def console_lines(scores: dict, run: Run | None = None) -> list[str]:
    console = Console(width=120, file=io.StringIO())
    console.print(closing_table(scores, run))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_closing_table_has_the_shape_of_the_design():
    told = console_lines(SCORES)
    assert told == [
        "before after n gate",
        "bits/byte, pretrain 7.90 → 2.31 ±0.02 51 k bytes ✓ at most -1.5 over start",
        "exact match, sft 0.0% → 91.2% ±1.3 450 prompts ✓ at least 0.8",
        "bits/byte, sft 2.31 → 2.56 ±0.03 51 k bytes",
        "val_loss, sft 0.09 ✓ at most 1",
    ]


def test_closing_table_with_a_run_adds_documents_compression_and_speed(tmp_path):
    assert console_lines(SCORES, fake_run(tmp_path / "demo"))[5:] == [
        "documents kept 420 → 405",
        "bytes per token 3.40",
        "training, tokens/s, pretrain 38,120 3.01 M tokens",
        "training, tokens/s, sft 38,120 1.72 M tokens",
        "generation, tokens/s 1,205",
    ]


def test_closing_table_marks_a_missed_gate_and_survives_gaps():
    row = {**SCORES["rows"][1], "label": "[bold]exact match"}
    gates = [{**SCORES["gates"][1], "bounds": "at least 0.95", "passed": False}]
    told = console_lines({"rows": [row, {"key": "odd", "before": None, "after": {"value": None}}], "gates": gates})
    assert told[1] == "[bold]exact match 0.0% → 91.2% ±1.3 450 prompts ✗ at least 0.95"
    assert told[2] == "odd"
    assert console_lines({})[0] == "before after n"
