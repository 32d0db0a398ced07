"""What is said of a tokenizer: figures counted by hand, pieces shown safely, the page, the commands."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from groundup.cli.data import tokenizer_app as app
from groundup.corpus import Document
from groundup.errors import DataError
from groundup.tokenizer import Tokenizer, measure
from groundup.tokenizer.measure import KNOWN, MOST_GROUPS, counter, figures
from groundup.tokenizer.page import write_page
from groundup.tokenizer.pieces import cut, in_colour, piece_of, readable

TEXTS = ["the king and the queen and the lion " * 20, "naïve 日本語 🙂 don't\r\n\t1900\n" * 5]
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=330)
DOCUMENTS = [
    Document("1", "the king and the queen", "books", "en"),
    Document("2", "the lion\n", "pages", "en"),
    Document("3", "日本語", "pages", "ja"),
]

runner = CliRunner()


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever vocabularies this machine has are not part of a test; and nobody goes to the network for one."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(*arguments: object) -> bytes:
        raise AssertionError(f"went to the network: {arguments}")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)


# --- Figures


def test_figures_are_those_counted_by_hand() -> None:
    measured = measure.measure(TOKENIZER, DOCUMENTS)
    n_tokens = [len(TOKENIZER.encode(document.text)) for document in DOCUMENTS]
    total = measured["total"]
    n_bytes = sum(len(document.text.encode()) for document in DOCUMENTS)
    assert [total[what] for what in ("documents", "words", "tokens", "bytes")] == [3, 8, sum(n_tokens), n_bytes]
    assert (total["bytes_per_token"], total["tokens_per_word"]) == (n_bytes / sum(n_tokens), sum(n_tokens) / 8)
    by_language = {group["name"]: group["tokens"] for group in measured["languages"]}
    assert list(by_language.items()) == [("en", n_tokens[0] + n_tokens[1]), ("ja", n_tokens[2])]
    by_source = {group["name"]: group for group in measured["sources"]}
    assert (by_source["books"]["bytes"], by_source["pages"]["documents"]) == (22, 2)
    assert measured["not_available_offline"] == ["GPT-2", "cl100k", "o200k"]


def test_token_counts_are_those_counted_by_hand() -> None:
    measured = measure.measure(TOKENIZER, DOCUMENTS)
    counts = dict.fromkeys(range(TOKENIZER.vocab_size), 0)
    for document in DOCUMENTS:
        for index in TOKENIZER.encode(document.text):
            counts[index] += 1
    unused = [index for index, count in counts.items() if count == 0 and index not in TOKENIZER.special_ids]
    assert measured["unused"] == len(unused)
    assert [token["id"] for token in measured["unused_examples"]] == unused[:60]
    used = sorted(counts.values(), reverse=True)
    assert measured["frequency_curve"][0] == [1, used[0]]
    assert all(count == used[rank - 1] for rank, count in measured["frequency_curve"])
    assert measured["frequency_curve"][-1][0] == sum(count > 0 for count in used)
    assert [token["count"] for token in measured["frequent"]] == [count for count in used if count][:40]
    assert all(token["count"] == counts[token["id"]] for token in [*measured["longest"], *measured["frequent"]])
    lengths = [len(TOKENIZER.token_bytes(token["id"])) for token in measured["longest"]]
    every_length = sorted((len(TOKENIZER.token_bytes(index)) for index in counts), reverse=True)
    assert lengths == every_length[: len(lengths)]


def test_small_groups_are_counted_together() -> None:
    documents = [Document(str(n), "x" * (n + 1), f"source {n}", "en") for n in range(MOST_GROUPS + 5)]
    sources = measure.measure(TOKENIZER, documents)["sources"]
    assert len(sources) == MOST_GROUPS + 1
    assert sources[0]["name"] == f"source {MOST_GROUPS + 4}"
    assert sources[-1]["name"] == "(others): 5"
    assert sum(group["bytes"] for group in sources) == sum(len(document.text) for document in documents)


def test_enough_text_is_enough() -> None:
    def endless() -> object:
        number = 0
        while True:
            number += 1
            yield Document(str(number), "the king and the queen", "books", "en")

    measured = measure.measure(TOKENIZER, endless(), most_bytes=1000)  # type: ignore[arg-type]
    assert 1000 <= measured["total"]["bytes"] <= 1000 + 22


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="no text"):
        measure.measure(TOKENIZER, [])


def test_samples_are_of_every_language() -> None:
    samples = measure.measure(TOKENIZER, DOCUMENTS)["samples"]
    assert {(sample["language"], sample["source"]) for sample in samples} == {
        ("en", "books"),
        ("en", "pages"),
        ("ja", "pages"),
    }
    assert samples[0]["ids"] == TOKENIZER.encode(DOCUMENTS[0].text)


# --- Well-known tokenizers


def cached(tmp_path: Path, contents: bytes, encoding: str) -> None:
    address = f"https://openaipublic.blob.core.windows.net/encodings/{encoding}.tiktoken"
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    (folder / hashlib.sha1(address.encode()).hexdigest()).write_bytes(contents)


RANKS = b"".join(base64.b64encode(bytes([value])) + f" {value}\n".encode() for value in range(256))


def test_a_vocabulary_in_tiktokens_cache_is_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A vocabulary of single bytes in the place of GPT-2's: one token a byte.
    cached(tmp_path, RANKS, "r50k_base")
    ranks = {bytes([value]): value for value in range(256)}
    bytewise = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(measure, "KNOWN", {"GPT-2": ("r50k_base", hashlib.sha256(RANKS).hexdigest())})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytewise if name == "r50k_base" else None)
    measured = measure.measure(TOKENIZER, DOCUMENTS)
    assert measured["not_available_offline"] == []
    assert measured["total"]["bytes_per_token_of"] == {"GPT-2": 1.0}
    assert all(group["bytes_per_token_of"] == {"GPT-2": 1.0} for group in measured["languages"])


@pytest.mark.parametrize("contents", [RANKS[:-1], b""])
def test_a_damaged_vocabulary_is_not_at_hand(contents: bytes, tmp_path: Path) -> None:
    """tiktoken would delete it and fetch another."""
    for encoding, sha256 in KNOWN.values():
        cached(tmp_path, contents, encoding)
        assert counter(encoding, sha256) is None


def test_the_vocabularies_are_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their addresses and digests are written down here; tiktoken has its own copy, which must say the same."""
    import tiktoken_ext.openai_public

    source = Path(tiktoken_ext.openai_public.__file__).read_text(encoding="utf-8")
    for encoding, sha256 in KNOWN.values():
        assert f"encodings/{encoding}.tiktoken" in source
        assert sha256 in source
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache at all
    assert all(counter(*known) is None for known in KNOWN.values())


# --- Pieces


@given(text=st.text(st.characters(categories=None)))
def test_pieces_are_safe_to_show_and_complete(text: str) -> None:
    pieces = cut(TOKENIZER, text)
    assert [piece.id for piece in pieces] == TOKENIZER.encode(text)
    joined = bytes.fromhex("".join(piece.bytes for piece in pieces))
    assert joined.decode() == re.sub("[\ud800-\udfff]", "\ufffd", text)
    each = [piece.shown for piece in pieces]
    shown = in_colour(each, colour=False).plain
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", shown)
    assert in_colour(each).plain.replace("\n", "") == "".join(each)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a·b"), ("\n", "↵"), ("\t", "⇥"), ("\x1b[31m", "␛[31m"), ("\x00", "␀"), ("\x7f", r"\u{7f}"),
        ("\x9b", r"\u{9b}"), ("\u202e", r"\u{202e}"), ("\u200d", r"\u{200d}"), ("\u00a0", r"\u{a0}"), ("日本", "日本"),
        ("\u0301", "◌\u0301"),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_spelled_out(text: str, shown: str) -> None:
    assert readable(text) == shown


def test_control_tokens_and_parts_of_characters_are_shown_as_such() -> None:
    assert piece_of(TOKENIZER, 0).shown == "<|endoftext|>"
    part = next(index for index in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(index) == b"\xe6")
    assert piece_of(TOKENIZER, part).shown == "⟨e6⟩"


# --- The page and the commands


class Checked(HTMLParser):
    """Counts tags, and what a page must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value for name, value in attributes if name in ("src", "href") and value]


def test_the_page_has_no_script_no_network_and_nothing_unescaped(tmp_path: Path) -> None:
    adversarial = [
        Document("1", "<script>alert(1)</script> \u202e \x1b[31m the king", "<b>books</b>", "en"),
        Document("2", "日本語", "pages", "ja"),
    ]
    write_page(measure.measure(TOKENIZER, adversarial), "<i>mine</i>", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Checked()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert "i" not in parsed.tags
    assert parsed.outside == []
    assert "default-src 'none'" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert parsed.tags.count("polyline") == 1
    assert page.count('title="') > 10
    for said in ("Bytes per token by language", "By source", "Never used", "Longest", "Not available offline: GPT-2"):
        assert said in page


def saved(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    TOKENIZER.save(run / "tokenizer")
    (run / "corpus").mkdir(parents=True)
    lines = [
        {
            "id": document.id,
            "text": document.text,
            "source": document.source,
            "language": document.language,
            "split": "train",
        }
        for document in DOCUMENTS
    ]
    (run / "corpus" / "documents.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    return run


@pytest.mark.parametrize("part", ["", "tokenizer", "tokenizer/tokenizer.json"])
def test_report_finds_the_tokenizer_and_the_corpus_of_a_run(part: str, tmp_path: Path) -> None:
    run = saved(tmp_path)
    done = runner.invoke(app, ["report", str(run / part), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(measure.measure(TOKENIZER, DOCUMENTS)))


def test_report_shows_tables_and_writes_the_page(tmp_path: Path) -> None:
    run = saved(tmp_path)
    done = runner.invoke(app, ["report", str(run), "--html", str(tmp_path / "out.html")])
    assert done.exit_code == 0, done.output
    for said in (
        "bytes/token",
        "language",
        "ja",
        "books",
        "Not available offline",
        "Never used",
        "longest",
        "the│·king",
    ):
        assert said in done.stdout
    assert (tmp_path / "out.html").is_file()
    assert "\x1b" not in done.stdout


def test_report_measures_by_named_files_in_their_languages(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "a.txt").write_text("The king and the queen went to the forest with their children.", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Der König und die Königin gingen mit ihren Kindern in den Wald.", encoding="utf-8")
    done = runner.invoke(
        app, ["report", str(tmp_path), "-t", str(tmp_path / "a.txt"), "-t", str(tmp_path / "b.txt"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert {group["name"] for group in json.loads(done.stdout)["languages"]} == {"en", "de"}


def test_report_without_any_text_names_the_option(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "alone")
    done = runner.invoke(app, ["report", str(tmp_path / "alone")])
    assert isinstance(done.exception, DataError)
    assert "--text" in str(done.exception)


def test_try_shows_pieces_and_ids(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    text = "the king <|end|> 日\x1b[31m"
    done = runner.invoke(app, ["try", str(tmp_path), text])
    assert done.exit_code == 0, done.output
    assert "the│·king" in done.stdout
    assert "␛" in done.stdout
    assert "\x1b" not in done.stdout
    ids = TOKENIZER.encode(text)
    assert all(re.search(rf"^ *{index} ", done.stdout, re.MULTILINE) for index in ids)
    as_json = json.loads(runner.invoke(app, ["try", str(tmp_path), text, "--json"]).stdout)
    assert [piece["id"] for piece in as_json["pieces"]] == ids
    assert as_json["tokens"] == len(ids)
    assert as_json["bytes_per_token"] == pytest.approx(len(text.encode()) / len(ids))


def test_try_in_colour_gives_each_piece_a_background_of_its_own() -> None:
    pieces = [piece.shown for piece in cut(TOKENIZER, "the king and the queen")]
    spans = in_colour(pieces).spans
    assert len(spans) == len(pieces)
    assert all(a.style != b.style for a, b in itertools.pairwise(spans))


def test_an_empty_text_has_no_tokens(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    done = runner.invoke(app, ["try", str(tmp_path), ""])
    assert done.exit_code == 0
    assert "0 tokens" in done.stdout


def test_groups_without_words_have_figures() -> None:
    found = figures("x", Counter())
    assert (found["bytes_per_token"], found["tokens_per_word"]) == (0.0, 0.0)
