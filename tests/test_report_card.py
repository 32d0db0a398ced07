"""The card of an exported model: the Hub's own reader reads it, and it has the figures of the run and no others."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from command import CommandLine, groundup
from tiny_run import copy_of_finished, finished_run

from groundup.files import own_folder, write_json
from groundup.recipe import parse_recipe
from groundup.report.card import model_card, run_of, write_modelfile
from groundup.report.record import read_record

__all__ = ["groundup"]


def test_an_exported_folder_has_a_card_with_the_figures_of_its_run(groundup: CommandLine, tmp_path: Path) -> None:
    run = finished_run()
    assert groundup("export", run.root, tmp_path / "out", "--to", "hf").code == 0
    assert groundup("export", run.root, tmp_path / "out", "--to", "hf", "--force").code == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    data = huggingface_hub.ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["groundup"])
    told = {result.metric_type: result.metric_value for result in data.eval_results}
    scores = json.loads((run.folder("evaluate") / "scores.json").read_text())["rows"]
    assert told == {row["key"]: row["after"]["value"] for row in scores if row["model"] == "sft"}
    assert (run.root / "recipe.toml").read_text(encoding="utf-8").strip() in text
    for stage in ("pretrain", "sft"):
        assert f"| {stage} |" in text
    assert "Not measured: " in text
    assert "harmful requests declined" in text


def test_a_card_names_data_with_licences_and_benchmarks(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    asked = {
        "n": 50,
        "n_contaminated": 3,
        "figures": {"accuracy": {"value": 0.6, "stderr": 0.07, "n": 50, "unit": "items"}},
    }
    own_folder(run.folder("sft") / "benchmarks")
    write_json(run.folder("sft") / "benchmarks" / "scores.json", {"tasks": {"copa": asked}})
    text = model_card(run, "sft", "out")
    data = huggingface_hub.ModelCard(text).data
    assert data.license == "unknown"
    assert [
        (one.dataset_name, one.metric_value) for one in data.eval_results if one.metric_type == "copa.accuracy"
    ] == [("copa", 0.6)]
    assert "| copa, accuracy | 0.6 ± 0.07 | 50 items |" in text
    assert "| sft | `groundup:tasks` | Apache-2.0, made by groundup's generators |" in text
    assert re.search(r"\| corpus \| `.*texts.jsonl` \| not stated \|", text)
    assert "- 3 of the 50 items of copa stand in the text that it was trained on." in text


def test_a_run_without_scores_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundup.report.card._scores", lambda record, stage: [])
    text = model_card(finished_run(), "pretrain", "out")
    assert "None was measured." in text
    assert "model-index" not in text
    assert "It continues text, and was not taught to answer" in text


def test_norwegian_is_a_language_in_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_record(finished_run())
    record = replace(record, filter_statistics={**record.filter_statistics, "languages": {"no": {}, "en": {}}})
    monkeypatch.setattr("groundup.report.card.read_record", lambda run: record)
    text = model_card(finished_run(), "sft", "out")
    assert huggingface_hub.ModelCard(text).data.language == ["en", "no"]  # a bare no is YAML's false
    assert "|\n\n## Limits" in text


def test_a_gguf_has_a_modelfile_beside_it(groundup: CommandLine, tmp_path: Path) -> None:
    done = groundup("export", finished_run().root, tmp_path / "small.gguf", "--to", "gguf", "--json")
    assert done.code == 0
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./small.gguf"
    assert lines[1].startswith("PARAMETER temperature ")
    made = write_modelfile(finished_run().folder("pretrain") / "model", tmp_path / "base" / "a.gguf")
    assert made.read_text().splitlines()[2] == 'TEMPLATE "{{ .Prompt }}"'


COPIES = """
[align.draft]
method = "distill"
start = "pretrain"
[quantize.small]
start = "pretrain"
[quantize.small-draft]
start = "draft"
[quantize.small-sft]
start = "sft"
[quantize.theirs]
start = "their/model"
"""


@pytest.mark.parametrize(
    ("stage", "answers"),
    [("small", False), ("draft", False), ("small-draft", False), ("small-sft", True), ("theirs", True)],
)
def test_a_copy_of_a_model_answers_if_that_does(stage: str, answers: bool, tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    written = (run.root / "recipe.toml").read_text(encoding="utf-8").rpartition("#")[0]
    run.create(parse_recipe(written + COPIES, "tiny"))
    shutil.copytree(run.folder("pretrain"), run.folder(stage))
    assert ("It was taught to answer" in model_card(run, stage, "out")) == answers
    modelfile = write_modelfile(run.folder(stage) / "model", tmp_path / "a.gguf")
    assert ("TEMPLATE" in modelfile.read_text()) == (not answers)


def test_a_folder_of_anybody_is_no_runs(tmp_path: Path) -> None:
    assert run_of(tmp_path / "model") is None
    run = finished_run()
    found = run_of(run.folder("sft") / "model")
    assert found is not None
    assert (found[0].root, found[1]) == (run.root, "sft")
