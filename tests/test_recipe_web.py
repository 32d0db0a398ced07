"""The recipe `web`, from end to end with a tiny model: real pages in three languages, and pages from a crawl."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from command import CommandLine, groundup
from data_stage import WORDS, sentence

from groundup.corpus import stream_documents
from groundup.corpus.quality.rules import rules_for
from groundup.recipe import read_recipe
from groundup.run import Run
from groundup.shards import TokenShards

__all__ = ["groundup"]

TINY = (
    "threads=1", "tokenizer.vocab_size=400", "model.preset=ground-nano", "model.context_length=64",
    "pretrain.tokens=4000", "pretrain.batch_size=8", "pretrain.eval_every=5", "pretrain.eval_tokens=2000",
    "pretrain.sample_tokens=4", "evaluate.limit=20", "evaluate.max_tokens=8",
)  # fmt: skip
"""What makes a build take seconds; nothing of the data stage is changed by it."""

PRIVATE = "Write to ann.miller@example.com or call +1 (212) 555-0142, from 93.184.216.34, card 4111 1111 1111 1111."
PLACEHOLDERS = ("ann.miller", "555-0142", "93.184.216.34", "4111 1111")


def build_web(groundup: CommandLine, *overrides: str) -> Any:
    """`groundup build web` into the folder `run`, quickly; its summary."""
    settings = [part for override in (*TINY, *overrides) for part in ("--set", override)]
    done = groundup("build", "web", "--out", "run", "--json", *settings)
    assert done.code == 0, done.err
    return done.json["stages"]


def check_run(root: Path) -> dict[str, Any]:
    """Every stage is done, on the same documents, and the counts add up; the filter statistics."""
    run = Run(root)
    manifests = {
        name: run.manifest(name) for name in ("corpus", "tokenizer", "shards", "pretrain", "evaluate/pretrain")
    }
    assert all(manifests.values())
    corpus, shards = (manifests[name].summary for name in ("corpus", "shards"))
    assert corpus["documents_in"] == corpus["documents_kept"] + sum(corpus["removed"].values())
    documents = list(stream_documents(root / "corpus"))
    assert shards["documents_train"] == sum(document.split == "train" for document in documents)
    assert TokenShards.open(root / "shards", "train").n_tokens == shards["tokens_train"]
    rows = json.loads((root / "evaluate" / "scores.json").read_text())["rows"]
    assert any("bits" in row["label"] for row in rows)
    page = (root / "report.html").read_text(encoding="utf-8")
    assert all(reason in page for reason in corpus["removed"])
    return dict(json.loads((root / "corpus" / "filter_statistics.json").read_text()))


def cut_of(shared_data: Path, out: Path, language: str, n: int) -> Path:
    """Some real pages in a language, a few in others, one of ours with private data, and a broken line."""
    source = shared_data / "raw_web" / "raw-small.jsonl"
    if not source.is_file():
        pytest.skip("needs real web pages in shared/data/raw_web, which are not here")
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    mine = [record for record in records if record["lang"] == language and 400 < len(record["text"]) < 8000]
    others = [record for record in records if record["lang"] != language and len(record["text"]) < 8000]
    chance = random.Random(1)
    chosen = [*mine[:n], *chance.sample(others, 20)]
    chosen.append({"text": f"{mine[-1]['text']}\n\n{PRIVATE}"})
    chosen += mine[:10]
    lines = [json.dumps(record, ensure_ascii=False) for record in chosen]
    lines[5:5] = ['{"text": "cut']
    out.write_text("\n".join(lines), encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("language", "n", "overrides"),
    [
        ("en", 30, ()),
        ("de", 25, ("corpus.languages=de",)),
        pytest.param("zh", 120, ("corpus.languages=zh",), marks=pytest.mark.long),
    ],
)
def test_real_pages_become_a_model(
    groundup: CommandLine,
    tmp_path: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    language: str,
    n: int,
    overrides: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    cut_of(shared_data, tmp_path / "my-pages.jsonl", language, n)
    corpus = build_web(groundup, "corpus.inputs=my-pages.jsonl", *overrides)["corpus"]["summary"]
    statistics = check_run(tmp_path / "run")
    assert corpus["documents_kept"] > n / 3
    assert corpus["removed"]["language"] >= 10
    assert corpus["removed"]["invalid JSON"] == 1
    assert corpus["removed"]["duplicate"] >= 1
    documents = list(stream_documents(tmp_path / "run" / "corpus"))
    assert {document.language for document in documents} == {language}
    assert not any(private in document.text for document in documents for private in PLACEHOLDERS)
    wanted = {rule.name for rule in rules_for(("gopher",), {})}
    assert {f"private: {kind}" for kind in ("email", "phone", "ip", "credit_card")} <= set(statistics["changed"])
    read = {"language", "invalid JSON", "duplicate", "near-duplicate", "empty", "short"}
    assert set(corpus["removed"]) <= wanted | read
    assert "gopher.min_stop_words" not in corpus["removed"]
    assert statistics["by_language"][language]["kept"] == corpus["documents_kept"]
    settings = json.loads((tmp_path / "run" / "corpus" / "stage.json").read_text())["settings"]
    assert settings["languages"] == [language]


def article(number: int, links: str) -> bytes:
    """A page that a person could have written, in a site's frame."""
    chance = random.Random(number)
    paragraphs = "".join(f"<p>{' '.join(sentence(chance) for _ in range(5))}</p>" for _ in range(4))
    contact = f"<p>{PRIVATE}</p>" if number == 3 else ""
    return (
        f"<!DOCTYPE html><html lang=en><head><title>Page {number}</title></head><body>"
        f"<nav><ul><li><a href='/'>Home</a></li><li><a href='/login'>Sign in</a></li></ul></nav>"
        f"<article><h1>About the {WORDS[number % len(WORDS)]} and the river</h1>{paragraphs}{contact}</article>"
        f"<footer>Copyright by nobody at all</footer><ul>{links}</ul></body></html>"
    ).encode()


def test_pages_of_a_crawl_become_a_model(
    groundup: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two commands at the head of the recipe, in an empty folder."""
    pytest.importorskip("scrapy")
    from misbehaving_server import MisbehavingServer, answering

    monkeypatch.chdir(tmp_path)
    n = 40
    with MisbehavingServer() as server:
        server.pages = {f"/p{number}": article(number, "") for number in range(n)}
        links = "".join(f"<li><a href='/p{number}'>{number}</a></li>" for number in range(n))
        server.pages["/copy"] = server.pages["/p7"]
        server.pages["/picture"] = answering(b"\x89PNG", kind="image/png")
        more = "<li><a href='/copy'>copy</a></li><li><a href='/picture'>x</a></li><li><a href='/gone'>x</a></li>"
        server.pages["/"] = article(n, links + more)
        crawled = groundup(
            "corpus", "crawl", server.url("/"), "--out", "pages", "--depth", "1", "--allow-private", "--delay", "0"
        )
        assert crawled.code == 0, crawled.err
    summary = build_web(groundup, "corpus.inputs=pages")["corpus"]["summary"]
    assert read_recipe("web").corpus.inputs == ("pages",)  # the override above is what the recipe says
    check_run(tmp_path / "run")
    assert summary["documents_in"] == n + 2
    assert summary["removed"]["duplicate"] == 1
    documents = list(stream_documents(tmp_path / "run" / "corpus"))
    assert len(documents) > n / 2
    for document in documents:
        assert document.url.startswith("http://127.0.0.1")
        assert document.source.endswith(".warc.gz")
        assert "Sign in" not in document.text
        assert "Copyright by nobody" not in document.text
        assert not any(private in document.text for private in PLACEHOLDERS)
