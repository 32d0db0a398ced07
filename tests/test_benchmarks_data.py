"""Benchmarks of the data stage and the server run in their smallest form; what is committed is what they write today.

Each script runs in a process of its own on next to nothing. Figures are not looked at: only that they are there, that
they are possible, and that no such run changes a result that is committed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_stage import text_of

from groundup.files import file_digest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
NAMES = ("data_chain", "data_memory", "extraction", "loader", "minhash", "serving", "soak", "tokenization")
WITHOUT_ROUNDS = ("data_memory", "soak")

HEAD = ("benchmark", "date", "environment.cpu", "environment.cores", "environment.groundup", "load_average")
SPREAD = ("n", "median", "min", "max")
FIELDS: dict[str, tuple[str, ...]] = {
    "data_chain": (
        "vocab_size", "versions.gigatoken", "versions.tiktoken", "versions.pyarrow",
        "corpora.*.corpus", "corpora.*.megabytes", "corpora.*.documents", "corpora.*.ratios",
        "corpora.*.groundup_stages", "corpora.*.rows.groundup.megabytes_per_cpu_second.median",
        "corpora.*.rows.groundup.megabytes_per_cpu_second_whole.median",
        "corpora.*.rows.groundup, tiktoken.megabytes_per_cpu_second.median",
        "corpora.*.rows.groundup, 2 workers.wall_seconds.median", "corpora.*.rows.*.peak_mib",
        "corpora.*.rows.*.children_peak_mib", "corpora.*.rows.*.documents_kept", "corpora.*.rows.*.tokens",
        "corpora.*.rows.*.stages",
    ),
    "data_memory": (
        "memory_mib", "split_mib", "rows.*.times_the_budget", "rows.*.megabytes", "rows.*.documents",
        "rows.*.workers", "rows.*.stage", "rows.*.process_mib", "rows.*.worker_mib", "rows.*.cpu_seconds",
        "growth.corpus, 2 workers.process", "growth.shards, 2 workers.worker",
        "growth.corpus, 2 workers.parent_bytes_per_document",
    ),
    "extraction": (
        "timed_pages", "mean_page_kib", "rows.*.extractor", "rows.*.pages_per_cpu_second.median",
        "rows.*.pages_per_second.median", "rows.*.article_extraction_benchmark.n_pages",
        "rows.*.article_extraction_benchmark.f1", "rows.*.mozilla_readability_words.n_pages",
        "rows.*.mozilla_readability_words.f1",
    ),
    "loader": (
        "target", "tokens", "sequence_length", "batch_size", "rows.*.million_tokens_per_cpu_second.median",
        "writing_mb_per_cpu_second.median",
    ),
    "minhash": (
        "input", "megabytes", "texts", "megabytes_per_cpu_second.signatures.median", "planted.*.min_agreement",
        "planted.*.similarities", "planted.*.recall_from_0.8", "planted.*.precision_from_0.7",
        "planted.*.by_similarity.*.from", "planted.*.by_similarity.*.sharing_a_band_by_formula",
    ),
    "serving": (
        "shape", "threads", "tokens", "versions.uvicorn", "versions.uvloop", "own.*.streams", "own.*.ratio",
        "own.*.http.median", "own.*.engine.median", "own.*.microseconds_per_token.median",
    ),
    "soak": (
        "clients", "minutes", "seen.whole", "seen.streamed", "n_wrong", "memory_mib.early", "memory_mib.late", "passes",
    ),
    "tokenization": (
        "vocab_size", "split", "ids_are_equal", "compared_mb", "engines.*.mb", "engines.*.mb_per_cpu_second.median",
        "engines.*.mb_per_cpu_second_again.median", "engines.*.load_cpu_seconds.median", "engines.*.peak_mib",
        "training.trainers.*.mb_per_cpu_second.median", "training.trainers.*.tokens",
        "training.tokens_of_rustbpe_over_huggingface",
    ),
}  # fmt: skip
"""What tables in the manual and the README are made of."""


def look_up(value: Any, path: str) -> list[Any]:
    """All values at a path such as `rows.*.peak_mib`.

    Raises:
        KeyError: there is none.
    """
    found = [value]
    while path:
        step, path = split_path(found[0], path)
        if step == "*":
            found = [one for outer in found for one in (outer.values() if isinstance(outer, dict) else outer)]
        else:
            found = [outer[step] for outer in found]
        if not found:
            raise KeyError(step)
    return found


def split_path(value: Any, path: str) -> tuple[str, str]:
    """The first step and the rest; keys may have dots in them."""
    keys = [key for key in (value if isinstance(value, dict) else ()) if f"{path}.".startswith(f"{key}.")]
    step = max(keys, key=len, default=path.partition(".")[0])
    return step, path[len(step) + 1 :]


def spreads(value: Any) -> Iterator[dict[str, float]]:
    """Every spread (n, median, min, max) in a result."""
    if isinstance(value, dict):
        if set(SPREAD) <= value.keys():
            yield value
        for inner in value.values():
            yield from spreads(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from spreads(inner)


def check_result(name: str, result: dict[str, Any]) -> None:
    """It has all that tables are made of, and its spreads are possible."""
    assert result["benchmark"] == name
    missing = []
    for path in (*HEAD, *FIELDS[name]):
        try:
            assert all(value is not None for value in look_up(result, path)), path
        except KeyError:
            missing.append(path)
    assert not missing
    found = list(spreads(result))
    assert found or name in WITHOUT_ROUNDS
    for one in found:
        assert one["n"] >= 1
        assert 0 <= one["min"] <= one["median"] <= one["max"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_has_what_the_tables_need(name: str) -> None:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"benchmarks/results/{name}.json is not committed yet: python benchmarks/{name}.py writes it")
    result = json.loads(path.read_text(encoding="utf-8"))
    check_result(name, result)
    # Several rounds (of the slowest baseline one), and nothing of the machine it ran on but what it is.
    assert all(one["n"] == 1 or one["n"] >= 3 for one in spreads(result))
    assert any(one["n"] >= 3 for one in spreads(result)) or name in WITHOUT_ROUNDS
    assert "/home/" not in path.read_text(encoding="utf-8")
    if name == "tokenization":
        assert result["ids_are_equal"] is True
    if name == "minhash":
        for row in result["planted"]:
            for one in row["by_similarity"]:
                assert one["found"] <= one["pairs"]
                assert one["sharing_a_band_by_formula"] <= one["pairs"]
    if name == "soak":
        assert (result["passes"], result["n_wrong"]) == (True, 0)
        assert result["clients"] >= 64
        assert result["minutes"] >= 10
    if name == "data_memory":
        assert 2 in {row["workers"] for row in result["rows"]}
        assert max(row["times_the_budget"] for row in result["rows"]) >= 10


def test_a_field_that_is_missing_is_noticed() -> None:
    result = {"rows": {"a, b": {"x.y": [{"z": 1}]}, "c": {"x.y": [{"z": 2}, {"z": 3}]}}}
    assert look_up(result, "rows.*.x.y.*.z") == [1, 2, 3]
    assert look_up(result, "rows.a, b.x.y.*.z") == [1]
    for path in ("rows.*.x.z", "rows.d", "rows.a, b.x.y.*.w"):
        with pytest.raises(KeyError):
            look_up(result, path)
    with pytest.raises(KeyError):
        look_up({"rows": []}, "rows.*.z")


@pytest.fixture
def untouched() -> Iterator[None]:
    """No result of these benchmarks appears, disappears or changes meanwhile."""

    def state() -> dict[str, str]:
        return {name: file_digest(RESULTS / f"{name}.json") for name in NAMES if (RESULTS / f"{name}.json").is_file()}

    before = state()
    yield
    assert state() == before


def ran(arguments: list[str], cwd: Path) -> str:
    """What a script said."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_data_chain_runs_and_leaves_no_result(untouched: None, tmp_path: Path) -> None:
    for library in ("gigatoken", "tiktoken"):
        pytest.importorskip(library)
    said = ran([str(BENCHMARKS / "data_chain.py"), "--quick", "--without-datatrove"], tmp_path)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in said.splitlines() if line.startswith("| ")}
    assert {"groundup", "groundup, tiktoken", "groundup, 2 workers"} <= rows.keys()
    # The same documents and tokens, whoever encodes and however many work.
    assert len({tuple(rows[name][-2:]) for name in rows if name.startswith("groundup")}) == 1
    assert "wall time, 2 workers over 1" in said
    assert "written:" not in said


@pytest.mark.long
def test_data_memory_runs_and_leaves_no_result(untouched: None, tmp_path: Path) -> None:
    said = ran([str(BENCHMARKS / "data_memory.py"), "--quick", "--workers", "1"], tmp_path)
    stages = [line.split(" | ")[3] for line in said.splitlines() if line.startswith("| ") and " ×)" in line]
    assert stages.count("corpus") == stages.count("shards") == 3
    assert "written:" not in said


ELSEWHERE = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import record
record.RESULTS = Path({results!r})
import {name} as benchmark
{change}
sys.argv = [{name!r}, *{arguments!r}]
benchmark.main()
"""


def result_of(tmp_path: Path, name: str, *arguments: str, change: str = "") -> dict[str, Any]:
    """What a script without a mode for trying it writes, somewhere else."""
    results = tmp_path / "results"
    program = ELSEWHERE.format(
        benchmarks=str(BENCHMARKS), results=str(results), name=name, arguments=list(arguments), change=change
    )
    assert "written:" in ran(["-c", program], tmp_path)
    found = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    check_result(name, found)
    return dict(found)


@pytest.mark.long
def test_loader_runs(untouched: None, tmp_path: Path) -> None:
    result_of(tmp_path, "loader", "--tokens", "4000000", "--batches", "2", "--rounds", "1")


@pytest.mark.long
def test_minhash_runs(untouched: None, tmp_path: Path) -> None:
    found = result_of(tmp_path, "minhash", "--megabytes", "0.3", "--rounds", "1", "--pairs", "60")
    for row in found["planted"]:
        assert sum(one["pairs"] for one in row["by_similarity"]) == row["pairs"] == 60


@pytest.mark.long
def test_tokenization_runs(untouched: None, tmp_path: Path) -> None:
    import random

    for library in ("gigatoken", "tiktoken", "rustbpe"):
        pytest.importorskip(library)
    chance = random.Random(1)
    rows = [json.dumps({"text": text_of(chance, 30), "lang": "en"}) + "\n" for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    data = ["--data", str(tmp_path / "a.jsonl"), "--rounds", "1", "--train-mb", "0.05", "--slow-mb", "0.02"]
    assert result_of(tmp_path, "tokenization", *data)["ids_are_equal"] is True


@pytest.mark.long
def test_extraction_runs(untouched: None, tmp_path: Path, shared_data: Path) -> None:
    if not (shared_data / "html").is_dir():
        pytest.skip("needs pages with their articles in shared/data/html, which are not here")
    few = (
        "articles, mozilla = benchmark.read_articles(), benchmark.read_mozilla()\n"
        "benchmark.read_articles = lambda: (articles[0][:8], articles[1][:8])\n"
        "benchmark.read_mozilla = lambda: (mozilla[0][:4], mozilla[1][:4])\n"
        "benchmark.TIMED_PAGES = 8\n"
    )
    found = result_of(tmp_path, "extraction", "--rounds", "1", change=few)
    assert [row["extractor"] for row in found["rows"]] == ["trafilatura", "resiliparse"]
    assert all(row["article_extraction_benchmark"]["n_pages"] == 8 for row in found["rows"])


def table_of(name: str, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The rows of the table that the manual shows of a result."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("tables")
    return [line.strip("| ").split(" | ") for line in tables.TABLES[name](result).splitlines()]


@pytest.mark.long
def test_serving_runs_and_has_its_table(untouched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--shape", "demo", "--rounds", "1", "--tokens", "16", "--python", "none")
    result = result_of(tmp_path, "serving", *small)
    head, _, *rows = table_of("serving", result, monkeypatch)
    assert [row[0] for row in rows] == ["8", "32"]
    assert all(len(row) == len(head) == 5 for row in rows)
    one = {"tokens_per_second": {"n": 1, "median": 7, "min": 7, "max": 7},
           "first_token_seconds": {"n": 1, "median": 0.5, "min": 0.5, "max": 0.5}}  # fmt: skip
    beside = [{"streams": 8, "groundup": one, "llama.cpp": one}]
    last = table_of("serving", {**result, "beside_llama_cpp": beside}, monkeypatch)[-1]
    assert last == ["8", *["7 (7 … 7), n = 1"] * 2, *["500 (500 … 500), n = 1"] * 2]


@pytest.mark.long
def test_soak_runs_and_has_its_table(untouched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(tmp_path, "soak", "--minutes", "0.2", "--clients", "24")
    assert result["passes"]
    assert table_of("soak", result, monkeypatch)[-1][4] == "0"
