"""Nobody's files are lost: whatever stood there and is not ours still stands, byte by byte, whatever groundup does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command import CommandLine, groundup  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples
from tiny_run import finished_run, write_recipe, write_texts

from groundup.corpus import curate
from groundup.corpus.crawl import CrawlSettings, crawl
from groundup.errors import GroundupError
from groundup.files import (
    atomic_folder,
    atomic_writer,
    clear_folder,
    is_ours,
    own_folder,
    remove_folder,
    remove_partials,
    temporary,
    write_signed,
    write_text,
)
from groundup.interop import save_model
from groundup.model import Transformer, preset
from groundup.recipe import CorpusSettings, Recipe
from groundup.run import Manifest, Run
from groundup.shards.stream import begin_shards

STAGES = ("corpus", "tokenizer", "pretrain")
OUTSIDE = ("documents.jsonl", "stage.json", "started.json", "annotated/unit/a.txt", "step-00000001/state.json")
FOLDERS = (*STAGES, ".groundup", "annotated", "checkpoints", "texts")
FILES = (
    "a.txt", "x.partial-abc", "recipe.toml", "report.html", "stage.json", "started.json", "documents.jsonl",
    "train-00000.bin", "crawl.json", "config.json", "a.txt.groundup-partial-0123456789abcdef",
    "corpus.groundup-replaced-0123456789abcdef",
)  # fmt: skip

places = st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=2), st.sampled_from(FOLDERS + FILES)).map(
    lambda place: Path(*place[0], place[1])
)
kinds = st.sampled_from(["file", "file", "folder", "link to a file", "link to a folder", "broken link"])
trees = st.lists(st.tuples(places, kinds), max_size=12)


def marked(folder: Path) -> bool:
    return (folder / ".groundup-folder").is_file() and not folder.is_symlink()


def theirs(folder: Path) -> dict[Path, object]:
    """Everything in a folder, but for what is in folders of ours."""
    found: dict[Path, object] = {}
    for path in folder.iterdir():
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_dir():
            found |= {} if marked(path) else {path: "a folder", **theirs(path)}
        else:
            found[path] = path.read_bytes()
    return found


def somewhere_else(folder: Path) -> Path:
    """A folder of another run: links may lead to it."""
    outside = folder / "outside"
    for place in (outside, outside / "annotated", outside / "annotated" / "unit", outside / "step-00000001"):
        own_folder(place)
    for name in OUTSIDE:
        write_text(outside / name, f"elsewhere: {name}")
    return outside


def put(root: Path, outside: Path, tree: list[tuple[Path, str]]) -> None:
    """Put somebody's files and links where nothing is yet, and no folder of ours."""
    for below, kind in tree:
        path = root / below
        inside = [root.joinpath(*below.parts[:n]) for n in range(1, len(below.parts))]
        if os.path.lexists(path) or any(marked(one) or one.is_symlink() or one.is_file() for one in inside):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.write_text(f"somebody's {below}")
        else:
            target = {"link to a file": outside / "stage.json", "link to a folder": outside}.get(kind, outside / "gone")
            path.symlink_to(target)


def built(run: Run, stage: str, turn: int, *, finished: bool = True, keeps: tuple[str, ...] = ()) -> None:
    """What a build of one stage does; unfinished, what one leaves that is killed while it writes."""
    recipe = Recipe(name="mine", seed=turn)
    run.check(recipe, STAGES)
    with run.lock():
        run.create(recipe)
        folder = run.begin(stage, str(turn), keeps)
        with atomic_folder(folder / "model") as made:
            (made / "weights").write_text(f"{turn}")
        if finished:
            run.finish(Manifest(stage, str(turn), 1.0, {}))
            run.write("report.html", f"{turn}", "<!-- {} -->")
        else:
            temporary(folder / "half").write_text("half")
            own_folder(temporary(folder / "model"))


ACTIONS: dict[str, Callable[[Run, str, int], object]] = {
    "build": built,
    "killed": lambda run, stage, turn: built(run, stage, turn, finished=False),
    "another recipe, keeping parts": lambda run, stage, turn: built(run, stage, turn + 9, keeps=("annotated",)),
    "--force": lambda run, stage, turn: run.forget(stage),
    "begin": lambda run, stage, turn: run.begin(stage, f"{turn}"),
    "clear": lambda run, stage, turn: run.clear(stage),
    "create": lambda run, stage, turn: run.create(Recipe(name="mine", seed=turn)),
    "a folder in its place": lambda run, stage, turn: replaced(run.root / stage),
    "shards": lambda run, stage, turn: begin_shards(run.root / stage),
    "remove": lambda run, stage, turn: (remove_folder(run.root / stage), clear_folder(run.root / stage)),
    "leftovers": lambda run, stage, turn: (remove_partials(run.root), remove_partials(run.root / stage)),
}


def replaced(folder: Path) -> None:
    with atomic_folder(folder) as made:
        (made / "new").write_text("new")


@given(
    st.lists(
        st.tuples(trees, st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.sampled_from(FOLDERS)), max_size=8)),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_not_ours_still_stands(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[list[tuple[Path, str]], list[tuple[str, str]]]]
) -> None:
    folder = tmp_path_factory.mktemp("nobodys")
    outside, run = somewhere_else(folder), Run(folder / "run")
    run.root.mkdir()
    for turn, (tree, actions) in enumerate(rounds):
        put(run.root, outside, tree)
        before = theirs(run.root) | theirs(outside)
        written = {run.root / name for name in ("recipe.toml", "report.html") if not_theirs(run.root / name)}
        for action, stage in actions:
            try:
                ACTIONS[action](run, stage, turn)
            except GroundupError:
                continue
        after = theirs(run.root) | theirs(outside)
        for path, content in before.items():
            empty_before = content == "a folder" and not any(path in one.parents for one in before)
            if path not in written and not (empty_before and (marked(path) or not path.exists())):
                assert after.get(path) == content, path


def not_theirs(path: Path) -> bool:
    """A file that groundup has written."""
    return path.is_file() and not path.is_symlink() and b"Written by groundup" in path.read_bytes()


@settings(max_examples=examples(10))
@given(trees, st.sampled_from(["corpus", "crawl", "model", "shards"]))
def test_stages_and_crawls_leave_folders_of_others_alone(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[Path, str]], what: str
) -> None:
    folder = tmp_path_factory.mktemp("nobodys")
    outside, out = somewhere_else(folder), folder / "out"
    texts = write_texts(folder / "texts.jsonl", 5)
    put(out, outside, tree)
    before = theirs(folder) | theirs(outside)
    try:
        if what == "corpus":
            curate(CorpusSettings(inputs=(str(texts),), languages=(), dedup="exact", workers=1), out)
        elif what == "crawl":
            crawl(["http://127.0.0.1:9/"], out, CrawlSettings())
        elif what == "shards":
            begin_shards(out)
        else:
            save_model(out, Transformer(preset("ground-nano", vocab_size=64, context_length=16)))
        assert marked(out)
        assert not tree
    except GroundupError:
        assert tree
    assert (theirs(folder) | theirs(outside)).items() >= before.items()


# --- At the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, texts in `texts/` and files that old versions took for leftovers of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    write_recipe(tmp_path, write_texts(tmp_path / "texts" / "a.jsonl"))
    for name in ("thesis.partial-draft", "texts/deep/x.partial-1234abcd"):
        (tmp_path / name).write_text("mine")
    return tmp_path


def test_a_folder_that_has_the_name_of_a_stage_is_refused(here: Path, groundup: CommandLine) -> None:  # noqa: F811
    (here / "corpus").mkdir()
    (here / "corpus" / "book.txt").write_text("Once upon a time. " * 100)
    before = theirs(here)
    for more in ([], ["--force"], ["--set", "corpus.inputs=corpus/*.txt"]):
        for command in ("corpus", "build"):
            ended = groundup(command, "tiny.toml", "--out", ".", *more)
            assert ended.code == 1
            assert "corpus: holds files that groundup did not make" in ended.err
            assert "Move it away, or choose another place with --out" in ended.err
    assert theirs(here) == before


def test_a_link_in_the_place_of_a_stage_is_refused(here: Path, groundup: CommandLine) -> None:  # noqa: F811
    assert groundup("corpus", "tiny.toml", "--out", "run").code == 0
    (here / "run" / "corpus").rename(here / "elsewhere")
    (here / "run" / "corpus").symlink_to(here / "elsewhere")
    before = {path.name: path.read_bytes() for path in (here / "elsewhere").iterdir() if path.is_file()}
    for more in ([], ["--force"], ["--set", "corpus.min_characters=20"]):
        ended = groundup("corpus", "tiny.toml", "--out", "run", *more)
        assert ended.code == 1
        assert "run/corpus: is a link" in ended.err
    assert {path.name: path.read_bytes() for path in (here / "elsewhere").iterdir() if path.is_file()} == before


def test_a_run_may_live_among_other_files(here: Path, groundup: CommandLine) -> None:  # noqa: F811
    before = theirs(here)
    for more in ([], ["--force"], ["--set", "corpus.min_characters=20"], []):
        assert groundup("tokenizer", "tiny.toml", "--out", ".", *more).code == 0
    assert groundup("build", ".", "--from", "nothing").code == 1
    after = theirs(here)
    assert after.items() >= before.items()
    assert {path.name for path in after.keys() - before.keys()} == {"recipe.toml", "report.html"}
    assert {path.name for path in here.iterdir() if marked(path)} == {".groundup", "corpus", "tokenizer"}


def test_a_recipe_and_a_page_of_ones_own_are_not_replaced(here: Path, groundup: CommandLine) -> None:  # noqa: F811
    (here / "tiny.toml").rename(here / "recipe.toml")
    by_hand = (here / "recipe.toml").read_bytes()
    assert groundup("corpus", "recipe.toml", "--out", ".").code == 0
    assert groundup("corpus", ".").code == 0
    refused = groundup("corpus", ".", "--set", "seed=5")
    assert refused.code == 1
    assert "recipe.toml: was not written by groundup, or was changed since" in refused.err
    assert (here / "recipe.toml").read_bytes() == by_hand

    (here / "report.html").write_text("my page")
    refused = groundup("corpus", ".", "--force")
    assert refused.code == 1
    assert "report.html: was not written by groundup" in refused.err
    assert (here / "report.html").read_text() == "my page"


@pytest.mark.parametrize(("out", "to", "name"), [("out", "hf", "out/README.md"), ("out.gguf", "gguf", "Modelfile")])
def test_what_stands_beside_an_exported_model_is_not_replaced(
    out: str,
    to: str,
    name: str,
    tmp_path: Path,
    groundup: CommandLine,  # noqa: F811
) -> None:
    export = ("export", finished_run().root, tmp_path / out, "--to", to, "--force")
    assert [groundup(*export).code for _ in range(2)] == [0, 0]
    (tmp_path / name).write_text("mine")
    before = theirs(tmp_path)
    refused = groundup(*export)
    assert refused.code == 1
    assert f"{name}: was not written by groundup, or was changed since" in refused.err
    assert theirs(tmp_path) == before
    assert (tmp_path / name).read_text() == "mine"


def test_what_groundup_wrote_is_written_again_until_somebody_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for text in ("seed = 1\n", "seed = 2"):
        write_signed(path, text, "# {}")
        assert path.read_text().startswith(text)
    path.write_text(path.read_text().replace("seed", "# Mine!\nseed"))
    with pytest.raises(GroundupError, match="was changed since"):
        write_signed(path, "seed = 3\n", "# {}")


def test_a_folder_is_marked_until_nothing_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment of its removal, a folder of ours is still known as ours."""
    folder = tmp_path / "ours"
    own_folder(folder)
    for name in ("a", "b/c"):
        with atomic_writer(folder / name):
            pass
    unlink = os.unlink

    def watching(path: str, **options: int) -> None:
        unlink(path, **options)
        assert is_ours(folder) or not any(folder.iterdir())

    monkeypatch.setattr(os, "unlink", watching)
    clear_folder(folder)
    assert not folder.exists()
