"""The manual and the README: their commands exist, their examples run, their tables are what the code says."""

from __future__ import annotations

import functools
import itertools
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import typer
from data_stage import text_of

from groundup.cli.main import make_app
from groundup.corpus.dedup.minhash import match_probability
from groundup.corpus.document import Reason
from groundup.corpus.quality.rules import all_rules
from groundup.files import read_json
from groundup.recipe import CorpusSettings, ShardsSettings, TokenizerSettings, parse_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
MANUAL = ROOT / "manual"
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(MANUAL.glob("*.md"))]
DATA_STAGE = MANUAL / "03-the-data-stage.md"
TOKENS = MANUAL / "04-tokenizer-and-shards.md"
GENERATION = MANUAL / "09-generation.md"
RUNS = MANUAL / "02-recipes-and-runs.md"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages ("" for none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every groundup command of a page: whole lines of blocks, and what stands in backticks."""
    lines = [line for block in blocks(page, "", "bash", "sh", "console") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in [*lines, *re.findall(r"`(groundup [^`]*)`", prose)]:
        words = shlex.split(line.removeprefix("$ ").split("  #")[0].replace("…", ""), comments=False)
        while words and "=" in words[0]:
            words = words[1:]
        if words and words[0].removeprefix(".venv/bin/") == "groundup":
            yield words[1:]


@functools.cache
def command_line() -> Any:
    return typer.main.get_command(make_app())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists_and_has_its_options(page: Path) -> None:
    for words in commands(page):
        command = command_line()
        rest = list(words)
        while subcommands := getattr(command, "commands", {}):
            if rest and rest[0] in subcommands:
                command = subcommands[rest.pop(0)]
            else:
                assert "build" in subcommands or not rest, f"groundup {' '.join(words)}: no such command"
                command = subcommands.get("build", command)
                if command not in subcommands.values():
                    break
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        given = {word.split("=")[0] for word in rest if re.match(r"--?[A-Za-z]", word)}
        assert given <= known, f"groundup {' '.join(words)}: {given - known}"


def test_every_page_of_the_manual_is_listed() -> None:
    listed = (MANUAL / "README.md").read_text(encoding="utf-8")
    for page in MANUAL.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", sorted(MANUAL.glob("0*.md")), ids=lambda page: page.name)
def test_every_piece_of_a_recipe_is_one(page: Path) -> None:
    for block in blocks(page, "toml"):
        parse_recipe(block, page.name)


def test_the_table_of_rules_is_the_file_of_rules() -> None:
    rows = re.findall(
        r"^\| `(\w+\.\w+)` \| `(\w+)` \| ([≥≤]) ([\d.,]+) \| (.+) \|$", DATA_STAGE.read_text(), re.MULTILINE
    )
    told = [(name, signal, sign, float(limit.replace(",", "")), source) for name, signal, sign, limit, source in rows]
    rules = all_rules().values()
    assert told == [
        (rule.name, rule.signal, "≤" if rule.least is None else "≥", rule.threshold, rule.source) for rule in rules
    ]


def test_every_preset_every_reason_and_every_setting_is_told() -> None:
    text, tokens = DATA_STAGE.read_text(encoding="utf-8"), TOKENS.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in ("gopher", "c4", "fineweb", "gentle"))
    judged = {Reason.SHORT, Reason.LANGUAGE, Reason.PREDICATE, Reason.CLASSIFIER, Reason.TOXIC, Reason.MIX}
    assert [reason for reason in Reason if reason not in judged and str(reason) not in text] == []
    assert [name for name in CorpusSettings.model_fields if name not in text] == []
    assert [
        name for name in (*TokenizerSettings.model_fields, *ShardsSettings.model_fields) if name not in tokens
    ] == []


def test_the_table_of_probabilities_is_the_formula() -> None:
    text = DATA_STAGE.read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if line.startswith("| bands × rows |"))
    similarities = [float(value) for value in re.findall(r"0\.\d+", head)]
    rows = re.findall(r"^\| (\d+) × (\d+) [^|]*\|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 3
    for bands, row_count, cells in rows:
        told = [float(cell.strip().removesuffix(" %")) for cell in cells.split("|")]
        assert told == [round(100 * match_probability(s, int(bands), int(row_count)), 1) for s in similarities]


def test_every_recipe_that_ships_is_named_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"groundup build {name}" in text for name in shipped_recipes())


@pytest.mark.parametrize(
    "room",
    [
        "corpus",
        "corpus/reading",
        "corpus/quality",
        "corpus/dedup",
        "corpus/decontamination",
        "corpus/crawl",
        "tokenizer",
        "shards",
        "cli",
    ],
)
def test_every_file_of_the_data_rooms_is_on_the_plan(room: str) -> None:
    plan = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    files = [path.stem for path in (ROOT / "groundup" / room).glob("*.py") if path.stem != "__init__"]
    assert [name for name in files if not re.search(rf"\b{name}\b", plan)] == []


def test_the_examples_of_the_data_stage_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    (tmp_path / "texts").mkdir()
    for number in range(60):
        text = f"Letter {number} to reader{number}@example.org. {text_of(chance, 30)}"
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    corpus_blocks, token_blocks = blocks(DATA_STAGE, "python"), blocks(TOKENS, "python")
    # The tokenizer's chapter ends with what makes shards and begins with what reads them.
    needs_shards = [block for block in token_blocks if '"shards' in block]
    makes_them = [block for block in token_blocks if block not in needs_shards]
    names: dict[str, object] = {}
    for block in corpus_blocks:
        exec(block, names)
    assert names["summary"]["documents_kept"] == 60  # type: ignore[index]
    names = {}
    for block in makes_them:
        exec(block, names)
    (tmp_path / "my-shards").rename(tmp_path / "shards")
    for block in needs_shards:
        exec(block, names)
    again = names["again"].manifest.splits  # type: ignore[attr-defined]
    for split in ("train", "validation"):
        pairs = itertools.pairwise([names["summary"][f"tokens_{split}"], again[split].tokens])  # type: ignore[index]
        assert all(one == other for one, other in pairs)


@pytest.mark.slow
def test_the_method_of_your_own_runs(tmp_path: Path) -> None:
    (program,) = blocks(RUNS, "python")
    (section,) = [block for block in blocks(RUNS, "") if block.startswith("[align.sft]")]
    (tmp_path / "my_method.py").write_text(program, encoding="utf-8")
    recipe = tiny_run.write_recipe(tmp_path, without="align.sft")
    recipe.write_text(recipe.read_text(encoding="utf-8") + section, encoding="utf-8")
    small = ["align.sft-kl.examples=200", "align.sft-kl.epochs=1.0", "align.sft-kl.replay=0.25"]
    command = ["build", str(recipe), "--out", "run", "--only", "sft-kl", *(f"--set={value}" for value in small)]
    done = subprocess.run([sys.executable, "my_method.py", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "run" / "sft-kl" / "stage.json")["summary"]
    assert 0 < summary["val_kl"] < 1
    assert summary["final_loss"] < summary["initial_loss"]


def test_the_examples_of_generation_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    names: dict[str, object] = {}
    for block in blocks(GENERATION, "python"):
        exec(block.replace("runs/demo", str(tiny_run.finished_run().root)), names)
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_tables_of_figures_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
