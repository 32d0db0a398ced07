"""`groundup compare`: stages, runs and seeds, in words and on a page; intervals and corrections by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from command import CommandLine, groundup
from scipy import stats
from test_report import Page, assert_harmless, fake_run
from tiny_run import copy_of_finished, finished_run

from groundup.errors import ArtifactError
from groundup.evaluation.comparison import compare_cards
from groundup.evaluation.scorecard import records_file
from groundup.files import own_folder, read_json, write_json
from groundup.recipe import parse_recipe
from groundup.run import Run
from groundup.stage import graph

__all__ = ["groundup"]


TASK_OF = {"exact_match": "groundup:tasks", "refusal_rate": "groundup:first-messages", "entropy": "groundup:style"}


def figures(folder: Path, **values: tuple[float, float, int]) -> Path:
    """Scores of items of their own: value, standard error and n of each figure."""
    own_folder(folder)
    tasks = {}
    for metric, (value, stderr, n) in values.items():
        task, identity = TASK_OF.get(metric, metric), f"{folder.name}{metric}"
        estimate = {"value": value, "stderr": stderr, "n": n, "unit": "prompts"}
        items = folder.name if metric != "bits_per_byte" else str(n)
        card = {"figures": {metric: estimate}, "groups": {}, "fingerprint": items, "identity": identity}
        tasks[task] = {**card, "core_shots": None}
        outcome = {"outcomes": {metric: True}}
        texts = [{"bits": [[8.0 * value]], "bytes": [[8]], "tokens": 9}, {"bits": [[8.0]], "bytes": [[8]], "tokens": 9}]
        records = texts if metric == "bits_per_byte" else [outcome, outcome]
        told = [{"identity": identity}, *({"item": place, **record} for place, record in enumerate(records))]
        (folder / records_file(task)).write_text("".join(json.dumps(line) + "\n" for line in told))
    write_json(folder / "scores.json", {"format": 2, "tasks": tasks, "core": None})
    return folder


def seeds(folder: Path, **values: list[float]) -> Path:
    own_folder(folder)
    rows = [{"key": key, "model": "sft", "label": f"{key}, sft", "values": each} for key, each in values.items()]
    write_json(folder / "seeds.json", {"seeds": [1, 2, 3], "rows": rows})
    return folder


def test_two_samples_by_hand(tmp_path: Path) -> None:
    first = figures(tmp_path / "a", exact_match=(0.50, 0.03, 300), refusal_rate=(0.30, 0.03, 300), entropy=(1, 0.1, 9))
    second = figures(tmp_path / "b", exact_match=(0.55, 0.04, 300), refusal_rate=(0.10, 0.04, 300), entropy=(9, 0.1, 9))
    match, refusal, entropy = compare_cards(first, second)
    assert (match.sample, match.value) == ("samples", pytest.approx(0.05))
    assert (match.low, match.high) == pytest.approx((0.05 - 1.959964 * 0.05, 0.05 + 1.959964 * 0.05))
    z = 0.05 / 0.05
    assert match.p == pytest.approx(math.erfc(z / math.sqrt(2)))  # the largest of three: corrected by one
    spread = math.hypot(0.03, 0.04) * math.sqrt(300)
    needed = math.ceil(((1.959964 + 0.841621) * spread / 0.02) ** 2)
    assert match.verdict == f"no difference shown at n = 300; {needed:,} items would show one of 2 points"
    assert refusal.verdict == "the second is better by 20 points"  # fewer refusals
    assert refusal.p == pytest.approx(2 * math.erfc(4 / math.sqrt(2)), rel=1e-6)  # the second of three: by two
    assert entropy.verdict == "the second is higher by 8"


def test_more_than_two_are_held_against_the_first_and_corrected_together(tmp_path: Path) -> None:
    values = {"a": 0.5, "b": 0.55, "c": 0.56}
    paths = [figures(tmp_path / name, exact_match=(value, 0.02, 600)) for name, value in values.items()]
    alone = [compare_cards(paths[0], other)[0] for other in paths[1:]]
    both = compare_cards(*paths)
    assert [one.other for one in both] == list(map(str, paths[1:]))
    assert both[1].p == pytest.approx(2 * alone[1].p)
    assert both[0].p == pytest.approx(max(alone[0].p, 2 * alone[1].p))
    assert [one.low for one in both] == [one.low for one in alone]


def test_seeds_by_welchs_formula(tmp_path: Path) -> None:
    a, b = [0.50, 0.52, 0.54], [0.60, 0.66, 0.63]
    one, flat = compare_cards(
        seeds(tmp_path / "a", exact_match=a, x=[1, 1]), seeds(tmp_path / "b", exact_match=b, x=[1, 1])
    )
    variances = [sum((x - sum(xs) / 3) ** 2 for x in xs) / 2 / 3 for xs in (a, b)]
    freedom = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
    assert (one.sample, one.n, one.value) == ("seeds", 3, pytest.approx(0.11))
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances))
    assert (one.low, one.high) == pytest.approx((0.11 - reach, 0.11 + reach))
    assert one.verdict == "the second is better by 11 points"
    assert (flat.p, flat.low, flat.high) == (1.0, 0.0, 0.0)


def test_a_benchmarks_figure_over_seeds_has_its_unit_and_direction(tmp_path: Path) -> None:
    found = [
        {"wikitext2.bits_per_byte": [1.0 + more, 1.01 + more], "arc_easy.brier": [0.5 + more, 0.51 + more]}
        for more in (0.0, 0.4)
    ]
    told = compare_cards(*(seeds(tmp_path / str(place), **values) for place, values in enumerate(found)))
    assert [one.verdict for one in told] == ["the first is better by 0.4 bits per byte", "the first is better by 0.4"]


def test_bits_per_byte_of_other_texts_are_not_compared(tmp_path: Path) -> None:
    paths = [
        figures(tmp_path / name, bits_per_byte=(value, 0.1, n), exact_match=(0.5, 0.1, 9))
        for name, value, n in (("a", 1.0, 100), ("b", 1.0, 200), ("c", 2.0, 100))
    ]
    assert [one.benchmark for one in compare_cards(paths[0], paths[1])] == ["exact_match"]
    bits = compare_cards(paths[0], paths[2])[0]  # the same two texts: 1 and 1, 2 and 1 bits per byte
    assert (bits.sample, bits.n, bits.first, bits.second, bits.value) == ("items", 2, 1.0, 1.5, 0.5)
    assert bits.verdict.endswith("would show one of 0.02 bits per byte")


def test_stages_and_runs_by_their_names(groundup: CommandLine) -> None:
    run = finished_run()
    found = groundup("compare", run.root / "pretrain", run.root / "evaluate" / "sft", "--json").json
    shared = {"bits_per_byte", "exact_match"}
    assert {one["benchmark"] for one in found} == shared
    card = read_json(run.root / "evaluate" / "sft" / "scores.json")
    match = next(one for one in found if one["benchmark"] == "exact_match")
    assert match["second"] == card["tasks"]["groundup:tasks"]["figures"]["exact_match"]["value"]
    assert {one["sample"] for one in found} == {"items"}
    same = groundup("compare", run.root, run.root, "--json").json
    assert {one["benchmark"] for one in same} == {
        f"{name}, {stage}" for name in shared for stage in ("pretrain", "sft")
    }
    assert {one["value"] for one in same} == {0.0}
    assert "exact_match" in groundup("compare", run.root / "pretrain", run.root / "sft", run.root / "sft").out


def test_scores_of_an_earlier_model_are_refused_with_the_command_that_makes_them_anew(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    assert compare_cards(run.folder("sft"), run.folder("sft"))
    manifest = run.manifest("sft")
    assert manifest is not None
    run.finish(replace(manifest, fingerprint="trained again"))
    for path in (run.root, run.folder("sft")):
        with pytest.raises(
            ArtifactError, match=r"evaluate/sft: these scores are of an earlier[\s\S]*groundup evaluate"
        ):
            compare_cards(path, path)


def test_one_alone_and_a_folder_without_scores_name_the_way_out(groundup: CommandLine, tmp_path: Path) -> None:
    assert "Name two or more" in groundup("compare", finished_run().root).err
    done = groundup("compare", tmp_path, tmp_path)
    assert (done.code, "groundup evaluate" in done.err) == (1, True)
    (tmp_path / "seeds.json").write_text('{"rows": [{"values": [1]}]}')
    assert "is no table of figures" in groundup("compare", tmp_path, tmp_path).err


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two finished runs that differ in a setting, a sample, an answer and a stage."""
    folder = tmp_path_factory.mktemp("two")
    first, second = fake_run(folder / "small"), fake_run(folder / "large")
    text = (second.root / "recipe.toml").read_text(encoding="utf-8").rpartition("#")[0]
    changed = text.replace("vocab_size = 2048", "vocab_size = 4096") + '\n[quantize.int8]\nstart = "sft"\n'
    second.create(parse_recipe(changed, "changed"))
    for name, stage in graph(second.recipe).items():
        if (manifest := second.manifest(name)) is not None:
            second.finish(replace(manifest, identity=stage.identity))
    samples = second.folder("pretrain") / "samples.jsonl"
    samples.write_text(samples.read_text().replace("there was a poor woodcutter", "there were <b>two</b>"))
    scores = second.folder("evaluate") / "scores.json"
    scores.write_text(scores.read_text().replace('"1 4 8"', '"8 4 1"'))
    return first, second


def test_page_of_two_runs_shows_what_differs(groundup: CommandLine, two: tuple[Run, Run], tmp_path: Path) -> None:
    written = tmp_path / "ab.html"
    done = groundup("compare", "--html", written, two[0].root, two[1].root)
    assert (done.out, done.err) == (f"{written}\n", "")
    page = Page(written)
    assert page.open == []
    assert_harmless(page)
    text = " ".join(page.text.split())
    assert "tokenizer.vocab_size20484096" in text
    assert "[quantize.int8]–there" in text
    assert "pretrain.lr" not in text
    assert "there were <b>two</b>" in text
    assert "✗ 1 4 8" in text
    assert "✗ 8 4 1" in text
    assert "3:20 min1.1 Wh" in text
    drawn = [figure for figure in page.named("figure") if "over tokens" in (figure.get("aria-label") or "")]
    assert len(drawn) == 2  # of pretraining and of fine-tuning
    again = groundup("compare", "--html", written, two[0].root, two[1].root)
    assert again.code == 0  # its own page is replaced
    written.write_text("mine")
    assert "is left as it is" in groundup("compare", "--html", written, two[0].root, two[1].root).err
    assert "no run in this folder" in groundup("compare", "--html", written, tmp_path, two[0].root).err


def test_page_with_scores_tells_intervals(groundup: CommandLine, tmp_path: Path) -> None:
    root = finished_run().root
    written = tmp_path / "same.html"
    done = groundup("compare", "--json", "--html", written, root, root, root)
    assert {one["value"] for one in done.json} == {0.0}
    page = Page(written)
    assert "no difference shown" in page.text
    assert "None: the runs have the same recipe." in page.text
    assert sum(tag == "circle" for tag, _ in page.tags) == 8  # two figures of two models, twice
