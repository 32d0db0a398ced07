"""The commands: what they print and where, their exit codes, and the lines that say how to go on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_run
import torch
from command import PROGRAM, CommandLine, Ended, groundup, run_to_end, start
from tiny_run import SCORES, STAGES, bits, copy_of_finished, finished_run, rewritten, times

from groundup import __version__, read_recipe
from groundup.distributed import World
from groundup.errors import Interrupted
from groundup.recipe import parse_recipe, recipe_toml, registered
from groundup.run import Run

__all__ = ["groundup"]

COMMANDS = [
    (), ("build",), *((name,) for name in registered()), ("generate",), ("chat",), ("report",), ("status",), ("runs",),
    ("doctor",), ("recipe",), ("recipe", "show"), ("recipe", "check"), ("recipe", "new"), ("corpus", "crawl"),
    ("tokenizer", "report"), ("tokenizer", "try"), ("shards", "verify"), ("shards", "stats"), ("shards", "show"),
    ("shards", "import"), ("shards", "export"), ("scaling",),
]  # fmt: skip


# --- Help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_examples(groundup: CommandLine, command: tuple[str, ...]) -> None:
    shown = groundup(*command, "--help")
    assert shown.code == 0
    assert shown.err == ""
    assert "Usage: groundup" in shown.out
    if command != ("recipe",):
        words = " ".join(shown.out.split())
        assert "Examples:" in words
        assert f"groundup {' '.join(command)}".strip() in words.partition("Examples:")[2]


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['groundup', sys.argv[1]]\n"
        "from groundup.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'matplotlib' in sys.modules, file=sys.stderr)"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "False False"
    assert done.stdout == f"groundup {__version__}\n"


def test_what_generates_imports_nothing_that_trains() -> None:
    run = finished_run()
    assert run.recipe.align
    code = (
        "import sys\nfrom groundup.cli.main import main\n"
        "try: main()\n"
        "finally: print([name for name in sys.modules if name.startswith(('groundup.training', 'groundup.alignment'))])"
    )
    command = [sys.executable, "-c", code, "generate", str(run.root), "The", "-n", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The")
    assert done.stdout.endswith("\n[]\n")


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, groundup; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- Building

ALL_DONE = dict.fromkeys(STAGES, "done")


def test_a_build_shows_progress_on_one_stream_and_the_table_on_the_other(groundup: CommandLine, tmp_path: Path) -> None:
    built = groundup("build", tiny_run.write_recipe(tmp_path), "--runs", tmp_path / "runs")
    assert built.code == 0
    assert "bits per byte" in built.out
    assert "exact match" in built.out
    assert "documents kept" in built.out
    assert not any(line.startswith(STAGES) for line in built.out.splitlines())
    lines = built.err.splitlines()
    assert lines[0].startswith(f"groundup {__version__} · recipe tiny · run {tmp_path}/runs/tiny · 1 threads, ")
    assert [line.split()[0] for line in lines if line.startswith(STAGES)] == list(STAGES)
    assert f"groundup chat {tmp_path}/runs/tiny" in built.err
    assert f"groundup recipe new my.toml --like {tmp_path}/runs/tiny" in built.err

    again = groundup("build", tmp_path / "runs" / "tiny", "--json")
    assert again.code == 0
    assert list(again.json["stages"]) == list(STAGES)
    assert again.json["run"] == str(tmp_path / "runs" / "tiny")
    scores = [(row["model"], row["key"]) for row in again.json["scores"]]
    assert scores == [("pretrain", "bits_per_byte"), ("sft", "bits_per_byte"), ("sft", "exact_match")]
    assert again.json["gates"] == []
    assert again.err.count("up to date") == len(STAGES)

    quiet = groundup("build", tmp_path / "runs" / "tiny", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_an_assistant_from_a_model_made_elsewhere_is_built_without_text(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = finished_run().root / "pretrain" / "model"
    Path("mine.toml").write_text(f'[align.helper]\nmethod = "sft"\nstart = "{start}"\nexamples = 100\nepochs = 0.2\n')
    built = groundup("sft", "mine.toml", "--out", "run")
    assert built.code == 0, built.err
    assert built.out == ""
    built = groundup("build", "mine.toml", "--out", "run")
    assert "Talk to it:    groundup chat run" in built.err
    assert "On a page:     groundup serve run --open" in built.err.splitlines()[-1]
    assert groundup("build", "run", "--json").json["scores"] is None
    assert "report.html" in groundup("report", "run").out
    told = groundup("generate", "run", "The", "-n", "2", "--json")  # it is the only model
    assert (told.code, Path(told.json["model"])) == (0, Path("run/helper/model"))


def test_stage_commands_do_what_they_stand_on_and_no_more(groundup: CommandLine, tmp_path: Path) -> None:
    recipe, folder = tiny_run.write_recipe(tmp_path), tmp_path / "here"
    made = groundup("shards", recipe, "--out", folder, "--json")
    assert made.code == 0
    assert list(made.json["stages"]) == ["corpus", "tokenizer", "shards"]
    assert made.json["stages"]["shards"]["summary"]["tokens_train"] > 0
    assert made.json["scores"] is None
    before = times(Run(folder))
    assert groundup("tokenizer", folder, "--force").code == 0
    assert rewritten(Run(folder), before) == {"tokenizer"}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), dict.fromkeys(STAGES, "done")),
        (("--force",), dict.fromkeys(STAGES, "forced")),
        (("--from", "sft"), {**ALL_DONE, "sft": "forced", "evaluate/sft": "forced"}),
        (("--from", "evaluate"), {**ALL_DONE, **dict.fromkeys(SCORES, "forced")}),
        (("--set", "align.sft.epochs=2"), {**ALL_DONE, "sft": "changed", "evaluate/sft": "changed"}),
        (("--set", "align.two.method=sft"), {**ALL_DONE, "two": "missing", "evaluate/two": "missing"}),
        (("--only", "sft"), dict.fromkeys(STAGES[:5], "done")),
        (
            ("--only", "evaluate/pretrain", "--only", "shards", "--force"),
            {
                "corpus": "done",
                "tokenizer": "done",
                "shards": "forced",
                "pretrain": "done",
                "evaluate/pretrain": "forced",
            },
        ),
        (("--out", "other"), dict.fromkeys(STAGES, "missing")),
    ],
)
def test_a_dry_run_tells_and_writes_nothing(
    groundup: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    shown: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished_run()
    before = times(run)
    told = groundup("build", run.root, "--dry-run", "--json", *options)
    assert told.code == 0
    assert told.json["stages"] == shown
    words = groundup("build", run.root, "--dry-run", *options)
    assert [line.split()[0] for line in words.out.splitlines()[1:]] == list(told.json["stages"])
    assert times(run) == before
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_one_stage_stops_at_it(groundup: CommandLine) -> None:
    told = groundup("tokenizer", finished_run().root, "--dry-run", "--force", "--json")
    assert told.json["stages"] == {"corpus": "done", "tokenizer": "forced"}


def test_a_missed_gate_exits_with_3_and_still_shows_the_table(groundup: CommandLine, tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    gate = ("--set", 'evaluate.gates=[{metric="exact_match", model="sft", min=0.99}]')
    missed = groundup("build", run.root, *gate)
    assert missed.code == 3
    assert "✗ at least 0.99" in missed.out
    assert "a gate of the recipe is missed: exact match of sft: at least 0.99, is 0" in missed.err
    assert "Train longer" in missed.err
    as_json = groundup("build", run.root, *gate, "--json")
    assert as_json.code == 3
    (shown,) = as_json.json["gates"]
    assert (shown["key"], shown["model"], shown["passed"]) == ("exact_match", "sft", False)


def test_smoke_is_for_recipes_only(groundup: CommandLine) -> None:
    refused = groundup("build", finished_run().root, "--smoke")
    assert refused.code == 1
    assert "--smoke" in refused.err
    told = groundup("build", "demo", "--smoke", "--dry-run", "--json")
    assert told.json["run"] == "runs/demo-smoke"


TEN_MISTAKES = """
name = "no/slash"
seed = -1
speed = 3

[corpus]
inputs = []
langages = ["en"]
dedup = "fuzzy"

[tokenizer]
vocab_size = 100

[pretrain]
tokens = "plenty"
lr = 0

[align.sftt]
epochs = 1
"""


def test_a_recipe_with_ten_mistakes_is_told_all_ten(groundup: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(TEN_MISTAKES)
    for command in (("build", path, "--runs", tmp_path / "runs"), ("recipe", "check", path), ("recipe", "show", path)):
        refused = groundup(*command)
        assert refused.code == 2
        assert refused.out == ""
        assert "wrong.toml: 10 problems" in refused.err
        for place in ("name", "seed", "speed", "inputs", "langages", "dedup", "vocab_size", "tokens", "lr", "sftt"):
            assert place in refused.err
        assert "Did you mean 'languages'?" in refused.err
        assert "Did you mean 'sft'?" in refused.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("build", "demmo"), 2, "Did you mean 'demo'?"),
        (("build",), 2, "Missing argument 'RECIPE'"),
        (("bild", "demo"), 2, "No such command 'bild'"),
        (("build", "demo", "--set", "nonsense"), 2, "is not of the form section.key=value"),
        (("build", "demo", "--set", "corpus.inputs=nowhere.txt"), 1, "nowhere.txt: no such file or folder"),
        (("build", "demo", "--from", "cleaning"), 1, "shards, pretrain, sft, reward, ppo, dpo, grpo"),
        (("sft", "shakespeare", "--dry-run"), 1, "no stage of this recipe is done by sft"),
        (("build", "demo", "--dry-run", "--only", "kto"), 1, "'kto' is no stage of this recipe"),
        (("recipe", "check", "demo", "--set", "align.sft.start=pretrian"), 2, "Did you mean 'pretrain'?"),
        (("status", "nowhere"), 1, "no run in this folder"),
        (("report", "nowhere"), 1, "no run in this folder"),
        (("chat", "nowhere"), 1, "no model here"),
        (("generate", "nowhere", "x"), 1, "no model here"),
        (("recipe", "check", "demo", "--set", "corpus.inputs=nowhere.txt"), 2, "nowhere.txt"),
        (("recipe", "check", "demo", "--set", "model.preset=ground-1n"), 2, "ground-1m"),
        (("recipe", "show", "demo", "--set", "model.preset=ground-1n"), 2, "ground-1m"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_exit_code(
    groundup: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = groundup(*arguments)
    assert refused.code == code
    assert refused.out == ""
    assert words in " ".join(refused.err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(groundup: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = groundup("build", tiny_run.write_recipe(tmp_path), "--runs", tmp_path / "file")
    assert refused.code == 1
    assert f"{tmp_path}/file" in refused.err


@pytest.mark.slow
def test_closed_streams_are_nobodys_fault(tmp_path: Path) -> None:
    for words, closed in ((f"recipe new {tmp_path}/mine.toml", "<&- >&-"), ("--version", "2>&-")):
        shell = f"{shlex.join(PROGRAM)} {words} {closed}"
        told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        assert "Traceback" not in told.stdout + told.stderr
    assert told.stdout == f"groundup {__version__}\n"
    assert (tmp_path / "mine.toml").is_file()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/x/texts"), "groundup: /x/texts: Permission denied."),
        (OSError(5, "Input/output error"), "groundup: Input/output error."),
    ],
)
def test_an_error_of_the_system_names_the_file_once_and_blames_no_writing(
    groundup: CommandLine, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("groundup.run.list_runs", fail)
    told = groundup("runs")
    assert (told.code, told.err.strip()) == (1, said)


# --- Looking


def test_status_runs_and_report(groundup: CommandLine, tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path / "runs")
    told = groundup("status", run.root, "--json").json
    assert told["working"] is False
    assert {name: stage["state"] for name, stage in told["stages"].items()} == dict.fromkeys(STAGES, "done")
    assert told["stages"]["shards"]["summary"]["tokens_train"] > 0

    run.forget("sft")
    words = groundup("status", run.root)
    assert f"Go on:  groundup build {run.root}" in words.out
    assert next(line for line in words.out.splitlines() if line.startswith("sft")).split() == ["sft", "missing"]
    with run.lock():
        assert groundup("status", run.root, "--json").json["working"] is True
        assert "working on it now" in groundup("status", run.root).out
        refused = groundup("build", run.root)
        assert (refused.code, f"process {os.getpid()}" in refused.err) == (1, True)

    (listed,) = groundup("runs", "--runs", run.root.parent, "--json").json
    assert listed["run"] == str(run.root)
    assert listed["done"] == [name for name in STAGES if "sft" not in name]
    assert str(run.root) in groundup("runs", "--runs", run.root.parent).out
    assert groundup("runs", "--runs", tmp_path / "none", "--json").json == []
    assert "groundup build demo" in groundup("runs", "--runs", tmp_path / "none").out

    (run.root / "report.html").unlink()
    shown = groundup("report", run.root)
    assert shown.out == f"{run.root}/report.html\n"
    assert (run.root / "report.html").is_file()


def test_doctor_speaks_json(groundup: CommandLine, tmp_path: Path) -> None:
    told = groundup("doctor", "--json", "--runs", tmp_path)
    assert told.json["ok"] is (told.code == 0)
    assert {"python", "torch", "memory", "expect"} <= {finding["name"] for finding in told.json["findings"]}


def test_a_recipe_is_shown_checked_and_copied(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = groundup("recipe", "show", "demo", "--set", "pretrain.tokens=1_000_000")
    assert tomllib.loads(shown.out)["pretrain"]["tokens"] == 1_000_000
    assert "# Derived:" in shown.out
    told = groundup("recipe", "show", "demo", "--json").json
    assert told["recipe"]["name"] == "demo"
    assert {"setting", "value", "reason"} == set(told["derived"][0])
    assert groundup("recipe", "check", "demo").out == "demo: no problems.\n"

    written = groundup("recipe", "new", "mine.toml")
    assert "groundup build mine.toml" in written.out
    assert read_recipe("mine.toml") == read_recipe("demo").model_copy(update={"name": "mine"})
    assert groundup("recipe", "new", "mine.toml").code == 1
    assert groundup("recipe", "new", "mine.toml", "--overwrite", "--like", str(finished_run().root)).code == 0
    assert read_recipe("mine.toml").align == finished_run().recipe.align
    short = Path("mine.toml").read_text().splitlines()
    assert len(short) < 50
    assert [line for line in short if " = " in line and "  # " not in line] == []
    assert groundup("recipe", "new", "all.toml", "--all").code == 0
    assert read_recipe("all.toml") == read_recipe("demo").model_copy(update={"name": "all"})
    assert len(Path("all.toml").read_text().splitlines()) > 150
    listed = groundup("recipe", "new", "--list").out
    assert all(name in listed for name in ("demo", "shakespeare", "ground-1m", "llama-160m"))


# --- Generating


def test_generate_continues_the_prompt(groundup: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = finished_run().root
    drawn = ("-n", "8", "--temperature", "0.9", "--seed", "3")
    told = groundup("generate", root, "The cat", *drawn, "--json").json
    assert told["prompt"] == "The cat"
    assert told["model"] == str(root / "pretrain" / "model")
    assert 1 <= told["n_tokens"] <= 8
    streamed = groundup("generate", root, "The cat", *drawn)
    assert streamed.out == f"The cat{told['text']}\n"
    assert streamed.err == f"model: {root}/pretrain (the base model; --model STAGE takes another)\n"
    for named in ((root / "sft" / "model",), (root, "--model", "sft")):
        other = groundup("generate", named[0], "The cat", *named[1:], *drawn, "--json")
        assert other.json["model"] == str(root / "sft" / "model")
        assert other.err == ""
    missing = groundup("generate", root, "The cat", "--model", "dpo")
    assert (missing.code, "Its models: sft, pretrain." in missing.err) == (1, True)
    wrong = groundup("generate", root, "The cat", "--temperature", "-1", "--top-p", "2")
    assert (wrong.code, wrong.out) == (1, "")
    assert "temperature" in wrong.err
    assert "top_p" in wrong.err
    # An argument may hold bytes that are no UTF-8.
    assert groundup("generate", root, os.fsdecode(b"caf\xe9"), *drawn, "--json").json["prompt"] == "caf\ufffd"


def test_generate_draws_as_it_is_told(groundup: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    root = finished_run().root
    plain = groundup("generate", root, "The", "-n", "12", "-t", "0")
    for draft in ("ngrams", "1", "sft", root / "sft" / "model"):
        drafted = groundup("generate", root, "The", "-n", "12", "-t", "0", "--draft", draft)
        assert (drafted.err, drafted.out) == (plain.err, plain.out)
    chosen = groundup("generate", root, "The", "--choice", "cat", "--choice", "dog", "--samples", "2", "--json").json
    assert {one["text"] for one in chosen["samples"]} <= {"cat", "dog"}
    assert re.fullmatch(r"The[ab]{3}\n", groundup("generate", root, "The", "--regex", "[ab]{3}").out)
    assert groundup("generate", root, "The", "--beams", "2", "--samples", "2", "-n", "3").out.count("The") >= 2
    refused = groundup("generate", root, "The", "--beams", "2", "--stop", "x", "-t", "0")
    assert refused.code == 1
    assert "--temperature, --stop would do nothing" in refused.err
    monkeypatch.setattr("groundup.generation.native.library", lambda: (None, "no C compiler found"))
    slow = groundup("generate", root, "The", "-n", "12", "-t", "0")
    assert (slow.out, slow.err.count("no C compiler found")) == (plain.out, 1)
    wrong = groundup("generate", root, "The", "--regex", "a", "--choice", "b")
    assert (wrong.code, "--regex and --choice" in wrong.err) == (1, True)
    assert "--precision float16" in groundup("generate", root, "The", "--precision", "float16").err
    assert "is no draft" in groundup("generate", root, "The", "--draft", "99").err


def test_a_run_of_several_assistants_is_talked_to_by_name(groundup: CommandLine, tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    for name in ("second", "control"):
        shutil.copytree(run.folder("sft"), run.folder(name))
    more = ["align.second.method=sft", "align.control.method=sft", "align.control.compute=second"]
    text, told = recipe_toml(run.recipe), ("--say", "Hello", "-n", "2", "--json")
    for chosen, name in (([], "second"), (["generate.model=sft"], "sft")):
        (run.root / "recipe.toml").write_text(recipe_toml(parse_recipe(text, "tiny.toml", [*more, *chosen])))
        said = groundup("chat", run.root, *told)
        assert said.json["model"] == str(run.root / name / "model")
        assert ("[generate] model" in said.err) is bool(chosen)
        named = groundup("chat", run.root, "--model", "control", *told)
        assert named.json["model"] == str(run.root / "control" / "model")


# --- Lines that can be pasted


@pytest.mark.parametrize(
    ("program", "on_path", "shown"),
    [
        ("venv/bin/groundup", False, "venv/bin/groundup"),
        ("venv/bin/groundup", True, "groundup"),
        ("{cwd}/venv/bin/groundup", False, "venv/bin/groundup"),
        ("/opt/tools/groundup", False, "/opt/tools/groundup"),
        ("/somewhere/groundup/__main__.py", False, "{python} -m groundup"),
        ("/usr/lib/pytest", False, "groundup"),
    ],
)
def test_the_lines_on_how_to_go_on_can_be_pasted(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, on_path: bool, shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "venv" / "bin" / "groundup"
    script.parent.mkdir(parents=True)
    script.touch(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin" if on_path else "/usr/bin")
    words = groundup("runs", program=program.format(cwd=tmp_path)).out
    expected = shown.format(cwd=tmp_path, python=sys.executable)
    assert words == f"No runs in runs. Make one:  {expected} build demo\n"


def test_of_several_processes_one_says_how_all_go_on(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise Interrupted("pretrain: stopped.")

    monkeypatch.setattr("groundup.pipeline.build", stop)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    recipe = tiny_run.write_recipe(tmp_path)
    go_on = f"Go on:  torchrun --nproc-per-node 2 -m groundup build {recipe} --set seed=2\n"
    for rank in (0, 1):
        world = World(rank, 2, torch.device("cpu"), None)
        monkeypatch.setattr("groundup.distributed.current_world", lambda world=world: world)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        stopped = groundup("build", recipe, "--set", "seed=2", "--from=sft")
        assert (stopped.code, stopped.out) == (130, "")
        assert stopped.err.endswith(go_on) if rank == 0 else stopped.err == ""


# --- Real processes


def seen(process: subprocess.Popen[str], words: str) -> list[str]:
    """What a process said up to a line with these words."""
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"ended without saying {words!r}: {''.join(lines)}")


@pytest.mark.slow
def test_stopped_while_training_it_says_how_to_go_on_and_does(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_run.write_recipe(tmp_path)
    longer = ("--set", "pretrain.tokens=20_000", "--set", "about=one of these")
    with start("build", recipe, *longer, "--from", "pretrain", "--force") as process:
        seen(process, "step=0/")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "pretrain: stopped at step" in err
    assert "everything is saved" in err
    arguments = shlex.split(err.partition("Go on:  ")[2])
    assert arguments[1:] == ["-m", "groundup", "build", str(recipe), *longer]
    done = groundup(*arguments[3:])
    assert done.code == 0
    assert "pretrain: going on from step" in done.err
    assert done.err.count("up to date") == 3
    whole = tiny_run.build_quietly(read_recipe(recipe, [longer[1], longer[3]]), tmp_path / "whole")
    assert bits(Run(tmp_path / "runs" / "tiny")) == bits(whole)


@pytest.mark.slow
def test_stopped_between_it_says_how_to_go_on(tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, tiny_run.write_texts(tmp_path / "many.jsonl", 10_000))
    run = Run(tmp_path / "runs" / "tiny")
    with start("build", recipe, cwd=tmp_path) as process:
        while not (run.root / "corpus" / "started.json").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. Finished stages are kept" in err
    assert f"-m groundup build {recipe}" in err
    assert "Traceback" not in err
    assert not run.is_worked_on()
    assert not list(tmp_path.rglob("*.groundup-partial-*"))


def test_tables_suit_pipes(groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    run = copy_of_finished(tmp_path / ("long-name-" * 12))
    told = groundup("status", run.root)
    assert "\x1b" not in told.out
    assert [line.split()[:2] for line in told.out.splitlines()[1:]] == [[name, "done"] for name in STAGES]
    listed = groundup("runs", "--runs", run.root.parent)
    assert any(line.startswith(str(run.root)) for line in listed.out.splitlines()), "a path was folded"
    table = groundup("build", run.root).out
    assert any("bits per byte" in line and "→" in line and "bytes" in line for line in table.splitlines())


@pytest.mark.slow
def test_streams_suit_pipes() -> None:
    told = run_to_end(
        "generate", finished_run().root, "-n", "4", given="The caf\u00e9\n",
        PYTHONIOENCODING="ascii", NO_COLOR="1", TERM="dumb",
    )  # fmt: skip
    assert told.code == 0
    assert told.out.startswith("The caf")
    # A pipe gets the model's text as it is, any control character included, but no colour of ours.
    assert not re.search(r"\x1b\[[0-9;]*m", told.out + told.err)
    shell = f"{shlex.join(PROGRAM)} --help | head -n 2"
    piped = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert piped.stdout.strip().startswith("Usage")
    assert "Traceback" not in piped.stderr
    assert "BrokenPipe" not in piped.stderr


def test_ended_is_strict_about_json() -> None:
    with pytest.raises(ValueError, match="Extra data"):
        _ = Ended(0, '{"a": 1}\nprogress', "").json
