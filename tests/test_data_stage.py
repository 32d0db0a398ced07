"""The whole data stage: the same bytes whoever does the work, however it is cut, and wherever it is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import start
from data_stage import digests, text_of, write_inputs, write_recipe
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lengths import N_KILLS, examples

from groundup.corpus import curate, stream_documents
from groundup.corpus.passes import ANNOTATED
from groundup.errors import GroundupError
from groundup.files import file_digest
from groundup.pipeline import build
from groundup.recipe import CorpusSettings, read_recipe


def corpus_files(out: Path) -> list[str]:
    return [file_digest(out / name) for name in ("documents.jsonl", "set_aside.jsonl", "filter_statistics.json")]


def curated(out: Path, *inputs: Path, **changes: Any) -> dict[str, Any]:
    chosen = {"quality": ("gopher",), "dedup_within": "paragraphs", "privacy": ("email",), **changes}
    return curate(CorpusSettings(inputs=tuple(map(str, inputs)), **chosen), out)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_inputs(folder, n=120)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    """The corpus of the few."""
    out = tmp_path_factory.mktemp("whole")
    curated(out, few)
    return out


def test_every_document_is_accounted_for_at_every_step(tmp_path: Path, inputs: Path) -> None:
    summary = curated(tmp_path, inputs)
    assert summary["documents_in"] == summary["documents_kept"] + sum(summary["removed"].values())
    assert summary["removed"]["duplicate"] == 4
    assert summary["removed"]["near-duplicate"] >= 4
    assert {"language", "invalid JSON", "no text field", "NUL characters", "empty", "invalid UTF-8", "cut off"} <= set(
        summary["removed"]
    )
    statistics = json.loads((tmp_path / "filter_statistics.json").read_text())
    for step, following in zip(statistics["steps"], statistics["steps"][1:], strict=False):
        assert step["out"] == following["in"] == step["in"] - sum(step["removed"].values())
        assert step["bytes_out"] == following["bytes_in"]
    for table in (statistics["by_source"], statistics["by_language"]):
        assert all(row["in"] == row["kept"] + sum(row["removed"].values()) for row in table.values())
    listed = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert len(listed) == sum(summary["removed"].values())
    assert statistics["duplicate_keys"]["count"] > 0
    assert statistics["changed"]["private: email"] == 1
    assert statistics["private"]["email"]
    assert not any("ann@example.org" in document.text for document in stream_documents(tmp_path))
    by_language = {language: row["in"] for language, row in statistics["by_language"].items()}
    for name, histogram in statistics["histograms"].items():
        # Signals are computed for documents in the languages asked for.
        seen = sum(by_language.values()) if name in ("characters", "language_score") else by_language["en"]
        assert sum(histogram["counts"]) == seen, name


@given(split_kib=st.sampled_from([2, 7, 30, 100, 400]), memory_mib=st.integers(128, 200), seed=st.integers(0, 9))
@settings(max_examples=examples(10), deadline=None, phases=[Phase.generate])
def test_neither_pieces_nor_memory_nor_the_order_of_files_change_a_byte(
    tmp_path_factory: pytest.TempPathFactory, few: Path, whole: Path, split_kib: int, memory_mib: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    files = sorted(few.iterdir())
    random.Random(seed).shuffle(files)
    curated(folder, *files, split_mib=split_kib / 1024, memory_mib=memory_mib, workers=1)
    assert corpus_files(whole)[:2] == corpus_files(folder)[:2]
    one, two = (json.loads((out / "filter_statistics.json").read_text()) for out in (whole, folder))
    assert {**one, "files": 0} == {**two, "files": 0}


def test_documents_do_not_depend_on_which_file_holds_them(tmp_path: Path) -> None:
    chance = random.Random(5)
    texts = [text_of(chance) for _ in range(60)]
    for name, order in (("one", texts), ("two", chance.sample(texts, len(texts)))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        curated(tmp_path / name, tmp_path / f"{name}.jsonl")
    one, two = ([(d.id, d.text, d.split) for d in stream_documents(tmp_path / name)] for name in ("one", "two"))
    assert one == two


def test_another_threshold_reads_no_text_again(tmp_path: Path, inputs: Path) -> None:
    strict = curated(tmp_path / "out", inputs, thresholds={"gopher.min_words": 150})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ANNOTATED).rglob("*") if path.is_file()}
    loose = curated(tmp_path / "out", inputs, thresholds={"gopher.max_duplicate_lines": False})
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ANNOTATED).rglob("*") if path.is_file()}
    assert before == after
    assert loose["documents_kept"] > strict["documents_kept"]
    curated(tmp_path / "anew", inputs, thresholds={"gopher.max_duplicate_lines": False})
    assert corpus_files(tmp_path / "out") == corpus_files(tmp_path / "anew")


def test_the_pipeline_keeps_measurements_when_a_threshold_changes(tmp_path: Path, few: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", few)
    build(read_recipe(recipe), tmp_path / "run", only=["corpus"])
    folder = tmp_path / "run" / "corpus" / ANNOTATED
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    build(read_recipe(recipe, ["corpus.min_characters=200"]), tmp_path / "run", only=["corpus"])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    build(read_recipe(recipe, ["corpus.unicode=NFKC"]), tmp_path / "run", only=["corpus"])
    assert not set(before) & set(folder.rglob("*.parquet"))


def test_a_file_that_is_added_is_the_only_one_that_is_read(tmp_path: Path) -> None:
    chance = random.Random(6)
    (tmp_path / "in").mkdir()
    for name in "abcdefgh":
        (tmp_path / "in" / f"{name}.txt").write_text(text_of(chance, 30))
    options: dict[str, Any] = {"split_mib": 0.003, "validation_by": "document"}  # a file a piece
    curated(tmp_path / "out", tmp_path / "in", **options)
    before = {path.name for path in (tmp_path / "out" / ANNOTATED).iterdir()}
    (tmp_path / "in" / "cc.txt").write_text(text_of(chance, 30))
    curated(tmp_path / "out", tmp_path / "in", **options)
    after = {path.name for path in (tmp_path / "out" / ANNOTATED).iterdir()}
    assert len(after - before) == 1
    assert before < after


def test_evaluation_data_is_found_and_listed(tmp_path: Path) -> None:
    chance = random.Random(3)
    texts = [text_of(chance) for _ in range(40)]
    question = " ".join(texts[7].split()[5:25])
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": question, "answer": "none"}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    summary = curated(
        tmp_path / "out", tmp_path / "a.jsonl", quality=("none",), decontaminate={"files": str(tmp_path / "quiz.jsonl")}
    )
    assert summary["removed"] == {"contaminated": 1}
    found = json.loads((tmp_path / "out" / "filter_statistics.json").read_text())["contamination"]["quiz"]
    assert (found["records"], found["records_hit"], found["documents"]) == (1, 1, 1)
    assert found["examples"][0]["text"]
    assert texts[7] not in {document.text for document in stream_documents(tmp_path / "out")}


def test_a_mixture_has_the_shares_asked_for(tmp_path: Path) -> None:
    chance = random.Random(4)
    for name, n in (("books", 300), ("web", 300)):
        rows = [json.dumps({"text": text_of(chance), "kind": name}) + "\n" for _ in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    mix = {"books": 0.8, "web": 0.2}
    options: dict[str, Any] = {"quality": ("none",), "source_field": "kind", "dedup_within": "none", "mix": mix}
    summary = curated(tmp_path / "out", tmp_path / "books.jsonl", tmp_path / "web.jsonl", **options)
    sizes = {"books": 0, "web": 0}
    for document in stream_documents(tmp_path / "out"):
        sizes[document.source] += len(document.text)
    assert abs(sizes["books"] / sum(sizes.values()) - 0.8) < 0.05
    assert summary["removed"]["mix"] + summary["documents_kept"] == 600


def test_a_predicate_a_classifier_and_a_word_list_decide(tmp_path: Path, inputs: Path) -> None:
    (tmp_path / "mine.py").write_text("def keep(document):\n    return 'river' in document.text\n")
    (tmp_path / "bad.txt").write_text("# words\nsilver\n")
    chance = random.Random(8)
    other = "".join(json.dumps({"text": f"{n} {n * 7} percent of {n * 3} index table value"}) + "\n" for n in range(60))
    (tmp_path / "no.jsonl").write_text(other)
    (tmp_path / "yes.jsonl").write_text("".join(json.dumps({"text": text_of(chance)}) + "\n" for _ in range(60)))
    summary = curated(
        tmp_path / "out", inputs, tmp_path / "no.jsonl", quality=("none",), dedup="exact", dedup_within="none",
        predicate=f"{tmp_path / 'mine.py'}:keep", toxic_words=str(tmp_path / "bad.txt"), max_toxic_share=0.06,
        classifier={"positive": str(tmp_path / "yes.jsonl"), "negative": str(tmp_path / "no.jsonl")}, languages=(),
    )  # fmt: skip
    assert summary["removed"]["predicate"] >= 60
    assert summary["removed"]["toxic words"] > 3
    for document in stream_documents(tmp_path / "out"):
        assert "river" in document.text
        assert document.score is not None
        assert document.score >= 0.5
    (tmp_path / "mine.py").write_text("def keep(document):\n    return True\n")
    again = curated(tmp_path / "out", inputs, quality=("none",), predicate=f"{tmp_path / 'mine.py'}:keep")
    assert "predicate" not in again["removed"]


def test_a_worker_that_is_killed_is_named_and_its_work_can_go_on(tmp_path: Path, few: Path, whole: Path) -> None:
    (tmp_path / "kill.py").write_text(
        f"import os, pathlib\nflag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
        "def keep(document):\n"
        "    if not flag.exists():\n        flag.touch(); os.kill(os.getpid(), 9)\n    return True\n"
    )
    options: dict[str, Any] = {"predicate": f"{tmp_path / 'kill.py'}:keep", "split_mib": 0.01, "workers": 2}
    with pytest.raises(GroundupError, match="a worker process was killed"):
        curated(tmp_path / "out", few, **options)
    assert not (tmp_path / "out" / "documents.jsonl").exists()
    curated(tmp_path / "out", few, **options)
    assert corpus_files(tmp_path / "out")[:2] == corpus_files(whole)[:2]


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one(tmp_path: Path, few: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", few)
    for workers in (1, 2):
        overrides = [f"corpus.workers={workers}", f"shards.workers={workers}", "corpus.split_mib=0.05"]
        build(read_recipe(recipe, overrides), tmp_path / str(workers), only=["shards"])
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_the_data_stage_ends_with_the_same_bytes(tmp_path: Path, few: Path) -> None:
    """Half of the kills are at any moment of a first attempt, half while it goes on where it was killed."""
    recipe = read_recipe(write_recipe(tmp_path / "r.toml", few, split_mib=0.05, workers=2))
    # Children that have imported everything already, so that a kill lands in the work and not in the imports.
    context, chance, run = multiprocessing.get_context("forkserver"), random.Random(1), tmp_path / "killed"
    context.set_forkserver_preload(["groundup.pipeline"])

    def build_for(seconds: float | None, run: Path) -> int | None:
        process = context.Process(target=build, args=(recipe, run), kwargs={"only": ["shards"]})
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    first = context.Process(target=os.getpid)  # with it comes the server that imports
    first.start()
    first.join()
    begun = time.monotonic()
    assert build_for(None, tmp_path / "whole") == 0
    seconds = time.monotonic() - begun
    ends = []
    for kill in range(N_KILLS):
        ends.append(build_for(chance.uniform(0.05, 0.95) * seconds, run))
        if kill % 2 and kill < N_KILLS - 2:
            run = run.with_name(f"killed{kill}")  # workers of the killed build may still write into the old one
    assert ends.count(-signal.SIGKILL) > N_KILLS / 2
    assert build_for(None, run) == 0
    _same(digests(tmp_path / "whole"), digests(run))
    assert not list(run.rglob("*.groundup-partial-*"))


RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which a command finds a Ray cluster of this machine, which outlives its drivers."""
    pytest.importorskip("ray")
    command = [
        sys.executable, "-u", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--port=0",
        "--include-dashboard=false", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as head:
        assert head.stdout is not None
        try:
            address = next(found[1] for line in head.stdout if (found := re.search("--address='(.*?)'", line)))
            yield {"RAY_ADDRESS": address, **RAY_ENVIRONMENT}
        finally:
            head.terminate()  # it ends the processes that it began, and no other cluster's


OUR_TASK = "ray::_call"  # the engine gives Ray every piece of work by this one function
ON_RAY = ("--set", "corpus.engine=ray", "--set", "corpus.workers=2")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ray_gives_the_same_bytes_also_when_its_workers_are_killed(
    tmp_path: Path, inputs: Path, cluster: dict[str, str]
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", inputs, split_mib=0.05)
    whole, _ = _to_the_end(recipe, tmp_path / "local")
    _same(whole, _to_the_end(recipe, tmp_path / "ray", *ON_RAY, **cluster)[0])
    for attempt in range(3):
        run = tmp_path / f"killed {attempt}"
        process = start("shards", recipe, "--out", run, *ON_RAY, **cluster)
        n_killed = 0
        while process.poll() is None:
            n_killed += _kill_one_ray_worker() if n_killed < 4 else 0
            time.sleep(0.02)
        assert process.returncode == 0, process.communicate()[1]
        _same(whole, digests(run))
        if n_killed:
            return
    pytest.fail("no worker could be caught at work")


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_driver_of_ray_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, few: Path, cluster: dict[str, str]
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", few, split_mib=0.05)
    whole, _ = _to_the_end(recipe, tmp_path / "local")
    _, seconds = _to_the_end(recipe, tmp_path / "ray", *ON_RAY, **cluster)
    _kill_again_and_again(whole, seconds, recipe, tmp_path / "killed", *ON_RAY, **cluster)


def _kill_again_and_again(
    whole: dict[str, str], seconds: float, recipe: Path, run: Path, *options: str, **environment: str
) -> None:
    """Half of the kills are at any moment of a first attempt, half while it goes on where it was killed."""
    chance = random.Random(1)
    for kill in range(N_KILLS):
        _killed_after(chance.uniform(0.15, 0.95) * seconds, recipe, run, *options, **environment)
        if kill % 2 and kill < N_KILLS - 2:
            run = run.with_name(f"killed{kill}")  # workers of the killed build may still write into the old one
    _same(whole, _to_the_end(recipe, run, *options, **environment)[0])


def _to_the_end(recipe: Path, run: Path, *options: str, **environment: str) -> tuple[dict[str, str], float]:
    begun = time.monotonic()
    process = start("shards", recipe, "--out", run, *options, **environment)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return digests(run), time.monotonic() - begun


def _killed_after(seconds: float, recipe: Path, run: Path, *options: str, **environment: str) -> None:
    process = start("shards", recipe, "--out", run, *options, **environment)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def _same(one: dict[str, str], two: dict[str, str]) -> None:
    assert one == two, [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]


def _kill_one_ray_worker() -> int:
    """Kill a Ray worker that is at work on our task, if there is one: 1, else 0."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith(OUR_TASK):  # Ray's own agents are called ray::, too
            process.kill()
            return 1
    return 0
