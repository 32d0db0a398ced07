"""The report of a run with branches: models, benchmarks, rollouts, attention and cost; and how a browser shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_server import chromium
from test_report import SCORES, Page, assert_harmless, done, fake_run, lines, training_summary
from tiny_run import finished_run

from groundup.files import own_folder, read_json, write_json
from groundup.recipe import parse_recipe
from groundup.report.cost import WATTS_A_THREAD, Cost, costs
from groundup.report.page import write_report
from groundup.report.record import read_record
from groundup.report.versus import write_versus
from groundup.run import Run

BRANCHES = """
[align.dpo]
start = "sft"
[align.dpo-control]
method = "sft"
start = "sft"
compute = "dpo"
[align.grpo]
start = "sft"
"""
SECONDS = {"dpo": 60.0, "dpo-control": 61.0, "grpo": 120.0}


def estimate(value: float, stderr: float) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": 500, "unit": "prompts"}


def run_with_branches(root: Path) -> Run:
    """The demo with DPO, its control and GRPO, all done."""
    run = fake_run(root)
    written = (run.root / "recipe.toml").read_text(encoding="utf-8").rpartition("#")[0]
    run.create(parse_recipe(written + BRANCHES, "demo"))
    for stage, seconds in SECONDS.items():
        own_folder(run.folder(stage))
        lines(run.folder(stage) / "metrics.jsonl", [{"step": n, "tokens": 9 * n, "loss": 1 / n} for n in (1, 2, 3)])
        done(run, stage, seconds, {**training_summary(3, 1.0, 0.3), "flops": 2e12})
    answers = [(0, "7", 0.0), (0, "7", 0.0), (5, "8", 0.0), (9, "8", 1.0), (9, "9", 0.0)]
    rollouts = [
        {"step": step, "prompt": "3+5?", "answer": answer, "reward": reward} for step, answer, reward in answers
    ]
    lines(run.folder("grpo") / "rollouts.jsonl", rollouts)
    before = estimate(0.912, 0.0133)
    rows = [
        {"key": "exact_match", "model": model, "label": f"exact match, {model}", "before": before, "after": after}
        for model, after in (
            ("dpo", estimate(0.80, 0.01)),
            ("dpo-control", estimate(0.93, 0.01)),
            ("grpo", estimate(0.99, 0.005)),
        )
    ]
    write_json(run.folder("evaluate") / "scores.json", {**SCORES, "rows": [*SCORES["rows"], *rows]})
    for stage, value in (("pretrain", 0.25), ("sft", 0.5)):
        own_folder(run.folder(stage) / "benchmarks")
        card = {"figures": {"accuracy": estimate(value, 0.02), "brier": estimate(0.3, 0.01)}}
        text = {"figures": {"bits_per_byte": estimate(0.9, 0.01)}}  # which is no share
        write_json(run.folder(stage) / "benchmarks" / "scores.json", {"tasks": {"arc_easy": card, "poems": text}})
    for stage in SECONDS:
        done(run, f"evaluate/{stage}", 0.0, {})
    attention = {"tokens": ["<|endoftext|>", "A"], "layers": [{"layer": 1, "heads": [[[100, 0], [37, 63]]] * 2}]}
    write_json(run.folder("evaluate") / "grpo" / "attention.json", attention)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_with_branches(tmp_path_factory.mktemp("branches") / "demo")


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return Page(write_report(run))


def test_the_page_is_as_closed_as_ever(page: Page) -> None:
    assert page.open == []
    assert_harmless(page)


def test_graph_shows_branches_and_controls(page: Page) -> None:
    words = next(figure["aria-label"] for figure in page.named("figure") if figure.get("class") == "pipeline")
    assert words is not None
    assert "dpo-control (after sft) (with dpo): control" in words
    assert "grpo (after sft)" in words
    assert sum(attributes.get("class") == "beside" for attributes in page.named("path")) == 1


def test_models_stand_beside_each_other_with_what_differs_marked(page: Page) -> None:
    text = page.text
    for model in (
        "pretrain",
        "sft, from pretrain",
        "dpo, from sft",
        "dpo-control (control), from sft",
        "grpo, from sft",
    ):
        assert model in text
    # 0.80 and 0.99 are more than two standard errors of the difference from 0.912; 0.93 is not.
    for cell in ("↓ 80.0% ±1.0", "93.0% ±1.0", "↑ 99.0% ±0.5"):
        assert cell in text
    assert "↑ 93.0%" not in text


def test_benchmarks_have_error_bars(page: Page) -> None:
    chart = next(label for figure in page.named("figure") if "arc_easy" in (label := figure.get("aria-label") or ""))
    assert chart == "arc_easy: pretrain 25% ± 2.0%, sft 50% ± 2.0%"
    assert "arc_easysftaccuracy50.0%±2.0500" in "".join(page.text.split())
    assert "poemssftbits_per_byte0.90±0.01500" in "".join(page.text.split())


def test_rollouts_are_shown_with_their_rewards(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "step 0: mean reward 0.00 of 2 that were kept" in text
    assert "step 9: mean reward 0.50 of 2 that were kept" in text
    assert "3+5?70.002" in text  # twice the same answer
    assert "3+5?81.001" in text


def test_heads_show_what_they_look_at(page: Page) -> None:
    heads = page.source[page.source.index('class="heads"') :]
    assert heads.count("<figure") >= 2
    # 100 % and 63 % are the fifth and sixth of the root's six levels, 37 % the fourth; what is 0 is not drawn.
    assert '<path fill-opacity="1.00" d="M0 0h1v1h-1z"/>' in heads
    assert '<path fill-opacity="0.83" d="M1 1h1v1h-1z"/>' in heads
    assert '<path fill-opacity="0.67" d="M0 1h1v1h-1z"/>' in heads
    assert "M1 0h1" not in heads


def test_cost_is_time_times_power_and_says_so(run: Run, page: Page) -> None:
    record = read_record(run)
    found = costs(record)
    hours = SECONDS["grpo"] / 3600
    assert found["grpo"] == pytest.approx(Cost(SECONDS["grpo"], 2e12, 2 * WATTS_A_THREAD * hours / 1000, 0.0))
    assert found["evaluate"].seconds == pytest.approx(1.1 + 10.1 + 10.2)
    seconds = sum(cost.seconds for name, cost in found.items() if name != "all")
    assert found["all"].seconds == pytest.approx(seconds)
    assert "Energy is estimated, not measured" in page.text
    stage = record.stages["grpo"]
    assert stage.manifest is not None
    environment = {"device": "NVIDIA A100-SXM4-80GB", "processes": 2, "threads": 8}
    on_two = replace(stage, manifest=replace(stage.manifest, environment=environment))
    (rented, _) = costs(replace(record, stages={"grpo": on_two})).values()
    assert rented == pytest.approx(Cost(SECONDS["grpo"], 2e12, 2 * 400 * hours / 1000, 2 * 1.40 * hours))
    unknown = replace(on_two, manifest=replace(stage.manifest, environment={"device": "Abacus 9"}))
    assert costs(replace(record, stages={"grpo": unknown}))["all"].told() == ("2:00 min", "2e+12", "")


def test_a_build_keeps_what_it_read_and_where_its_heads_look() -> None:
    run = finished_run()
    corpus, sft = run.manifest("corpus"), run.manifest("sft")
    assert corpus is not None
    assert sft is not None
    assert {*corpus.outside} == {"inputs"}
    assert sft.outside["data"]
    source = (run.root / "report.html").read_text(encoding="utf-8")
    assert corpus.outside["inputs"] in source
    kept = read_json(run.folder("evaluate") / "sft" / "attention.json")
    n = len(kept["tokens"])
    for layer in kept["layers"]:
        for head in layer["heads"]:
            assert [len(row) for row in head] == [n] * n
            assert all(abs(sum(row) - 100) <= n for row in head)  # each rounded to a percent
            assert all(weight == 0 for place, row in enumerate(head) for weight in row[place + 1 :])
    assert not (run.folder("evaluate") / "before-pretrain" / "attention.json").exists()
    assert "Attention of sft" in source


def test_damaged_attention_rollouts_and_benchmarks_are_left_out(tmp_path: Path) -> None:
    run = run_with_branches(tmp_path / "demo")
    attention = run.folder("evaluate") / "grpo" / "attention.json"
    for contents in ('{"tokens": ["a"], "layers": [3, {"heads": [7, [["x"]]]}]}', "[1]", "{"):
        attention.write_text(contents)
        (run.folder("sft") / "benchmarks" / "scores.json").write_text(contents)
        (run.folder("grpo") / "rollouts.jsonl").write_text('{"step": 1}\n{"step": null}\n')
        page = Page(write_report(run))
        assert "Attention of" not in page.text
        assert "Answers it learned from" not in page.text


def test_scores_of_an_earlier_model_are_not_shown(tmp_path: Path) -> None:
    run = run_with_branches(tmp_path / "demo")
    card = {"figures": {"accuracy": estimate(0.7, 0.02)}, "groups": {}, "fingerprint": "", "identity": ""}
    write_json(run.folder("evaluate") / "grpo" / "scores.json", {"format": 2, "tasks": {"piqa": card}, "core": None})
    assert read_record(run).benchmarks["grpo"] == {"piqa": card}
    assert "Attention of grpo" in Page(write_report(run)).text
    manifest = run.manifest("grpo")
    assert manifest is not None
    run.finish(replace(manifest, fingerprint="e" * 32))  # made again, and not yet scored
    record, told = read_record(run), Page(write_report(run)).text
    assert {row["model"] for row in record.scores["rows"]} == {"pretrain", "sft", "dpo", "dpo-control"}
    assert record.scores["answers"]
    assert "grpo" not in record.benchmarks.keys() | record.attention.keys()
    assert "Attention of grpo" not in told
    assert "of an earlier model or recipe: the scores in evaluate/grpo." in told
    run.forget("evaluate/sft")
    record = read_record(run)
    assert [gate["key"] for gate in record.scores["gates"]] == ["bits_per_byte", "val_loss"]
    assert record.scores["answers"] == []


@pytest.mark.slow
def test_pages_in_chromium_are_quiet_and_fit(run: Run, tmp_path: Path) -> None:
    """Three widths, light and dark: no word on the console, no request but the page's own, nothing sticks out."""
    other = run_with_branches(tmp_path / "other")
    write_versus([run, other], tmp_path / "versus.html")
    with chromium() as browser:
        for place in (write_report(run), tmp_path / "versus.html"):
            backgrounds = set()
            for width in (400, 900, 1400):
                for scheme in ("light", "dark"):
                    said: list[str] = []
                    asked: list[str] = []
                    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
                        tab = context.new_page()
                        tab.on("console", lambda message, said=said: said.append(message.text))
                        tab.on("pageerror", lambda error, said=said: said.append(str(error)))
                        tab.on("request", lambda request, asked=asked: asked.append(request.url))
                        tab.goto(place.as_uri())
                        tab.wait_for_load_state("networkidle")
                        assert said == []
                        assert asked == [place.as_uri()]
                        assert tab.evaluate("document.documentElement.scrollWidth") == width
                        seen = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                        backgrounds.add((scheme, seen))
                        for plot in tab.query_selector_all("figure.plot"):
                            assert plot.bounding_box()["height"] > 60
            assert len(backgrounds) == 2
            assert len({colour for _, colour in backgrounds}) == 2
