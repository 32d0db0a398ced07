"""The corpus stage: filters in order, counts that add up, a held-out part that depends on the text alone."""

import json
import string
from pathlib import Path
from typing import Any

import pytest

from groundup.console import Console
from groundup.corpus import curate, stream_documents
from groundup.corpus.document import text_id
from groundup.errors import ArtifactError, DataError
from groundup.recipe import CorpusSettings

ENGLISH = "The fox walked through the forest and looked for something good to eat, number {}."
FRENCH = "Le renard se promenait dans la forêt et cherchait quelque chose à manger, numéro {}."


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def curated(out: Path, *inputs: Path, **changes: Any) -> dict[str, Any]:
    # The texts here differ in a word or two; near-duplicates have tests of their own.
    return curate(CorpusSettings(inputs=tuple(map(str, inputs)), **{"dedup": "exact", **changes}), out)


def test_filters_remove_in_order_and_the_counts_add_up(tmp_path: Path) -> None:
    english = [ENGLISH.format(n) for n in range(40)]
    texts = [*english, *english[:5], *(FRENCH.format(n) for n in range(7)), "short", "short", FRENCH.format(0), ""]
    summary = curated(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts), min_characters=10)
    sizes = [len(text.encode()) for text in texts]
    assert summary["removed"] == {"empty": 1, "short": 2, "language": 8, "duplicate": 5}
    assert (summary["documents_in"], summary["documents_kept"]) == (len(texts), 40)
    assert summary["documents_train"] + summary["documents_validation"] == 40
    assert (summary["bytes_in"], summary["bytes_kept"]) == (sum(sizes), sum(sizes[:40]))
    assert summary["characters_kept"] == sum(map(len, english))
    assert summary["validation_by"] == "document"
    found = list(stream_documents(tmp_path / "out"))
    assert sorted(document.text for document in found) == sorted(english)
    assert [document.id for document in found] == sorted(text_id(text) for text in english)
    assert {document.language for document in stream_documents(tmp_path / "out")} == {"en"}


def test_what_was_left_out_is_listed_with_its_place(tmp_path: Path) -> None:
    texts = [ENGLISH.format(n) for n in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[3], FRENCH])
    curated(tmp_path / "out", path)
    listed = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert [(record["source"], record["record"], record["reason"]) for record in listed] == [
        (str(path), "line 31", "duplicate"),
        (str(path), "line 32", "language"),
    ]
    kept = {document.id: document.text for document in stream_documents(tmp_path / "out")}
    assert kept[listed[0]["detail"].split()[-1]] == texts[3]
    assert listed[1]["excerpt"].startswith("Le renard")
    statistics = json.loads((tmp_path / "out" / "filter_statistics.json").read_text())
    for step, following in zip(statistics["steps"], statistics["steps"][1:], strict=False):
        assert step["out"] == following["in"] == step["in"] - sum(step["removed"].values())
    assert (statistics["steps"][0]["in"], statistics["steps"][-1]["out"]) == (32, 30)
    assert statistics["languages"] == {"en": 31, "fr": 1}
    assert statistics["examples"]["language"] == [listed[1]]


def test_duplicates_are_found_after_normalization_and_the_first_survives(tmp_path: Path) -> None:
    texts = [
        "A caf\u00e9 in the old town, and rain.",
        "A cafe\u0301 in the old town, and rain.\r\n",
        "Another text is this.",
    ]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    kept = {"dedup": "exact", "languages": []}
    assert curated(tmp_path / "out", path, **kept)["removed"] == {"duplicate": 1}
    first = next(stream_documents(tmp_path / "out"))
    assert texts[0].startswith(first.text)
    assert curated(tmp_path / "none", path, **{**kept, "dedup": "none"})["removed"] == {}
    assert curated(tmp_path / "raw", path, **{**kept, "unicode": "none"})["removed"] == {}


def test_short_lines_are_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    """Navigation is short: the setting reaches the search."""
    texts = [f"Home\nContact us\nWhat page {n} has to say stands here and nowhere else." for n in ("one", "two")]
    path, kept = write_jsonl(tmp_path / "a.jsonl", texts), {"languages": [], "dedup_within": "lines"}
    for characters, n in ((20, 2), (4, 1)):
        out = tmp_path / str(characters)
        curated(out, path, **kept, dedup_within_characters=characters)
        assert "".join(document.text for document in stream_documents(out)).count("Home") == n


def test_near_duplicates_are_found_where_no_spaces_stand(tmp_path: Path) -> None:
    one = "从前有一座山，山上有一座庙，庙里有一个老和尚给小和尚讲故事。他说很久以前有一位国王住在海边的城里。"
    other = "春天来了，花园里的花都开了，孩子们高兴地跑来跑去，鸟儿在树上唱歌，老师坐在长椅上看着他们慢慢长大。"
    path = write_jsonl(tmp_path / "a.jsonl", [one * 3, one * 3 + "故事讲完了。", other * 3])
    assert curated(tmp_path / "out", path, languages=[], dedup="near")["removed"] == {"near-duplicate": 1}


@pytest.mark.parametrize("by", ["document", "tail"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, by: str) -> None:
    texts = [ENGLISH.format(n) for n in range(50)] + [FRENCH, "{broken"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    summaries = [curated(tmp_path / name, path, validation_by=by) for name in ("one", "two", "two")]
    assert summaries[0] == summaries[1] == summaries[2]
    for name in ("documents.jsonl", "set_aside.jsonl", "filter_statistics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_shipped_classics_hold_out_a_tenth(tmp_path: Path) -> None:
    summary = curate(CorpusSettings(), tmp_path, Console(quiet=True))
    assert (summary["documents_in"], summary["documents_kept"], summary["removed"]) == (420, 420, {})
    assert 0.07 < summary["documents_validation"] / 420 < 0.13


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_neither_part_is_ever_empty(tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ENGLISH.format(n) for n in range(25)])
    chosen = CorpusSettings(inputs=(str(path),), validation_share=share, dedup="exact")
    summary = curate(chosen, tmp_path / "out", Console(quiet=True))
    assert min(summary["documents_train"], summary["documents_validation"]) == 1
    assert "no document's hash falls to" in capsys.readouterr().err


def test_shakespeare_is_cut_between_two_lines_at_nine_tenths(tmp_path: Path) -> None:
    curate(CorpusSettings(inputs=("groundup:shakespeare",), languages=(), validation_by="tail"), tmp_path)
    train, validation = stream_documents(tmp_path)
    n = len(train.text) + len(validation.text)
    assert abs(len(validation.text) / n - 0.1) < 0.03
    assert validation.text[0].isupper()
    assert train.text.rstrip()[-1] in string.punctuation


def test_a_text_of_one_character_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="1 characters of text are too few"):
        curated(tmp_path / "out", tmp_path / "a.txt", languages=[])
    assert not (tmp_path / "out" / "documents.jsonl").exists()


def test_faults_are_shown_even_when_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{ENGLISH.format(n)}"}}\n' for n in range(30)) + '{"text"')
    curate(CorpusSettings(inputs=(str(tmp_path / "a.jsonl"),), dedup="exact"), tmp_path / "out", Console(quiet=True))
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 records or files cannot be used" in shown
    assert "line 31: invalid JSON" in shown


def test_damaged_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"documents\.jsonl: not found"):
        next(stream_documents(tmp_path))
    path = write_jsonl(tmp_path / "a.jsonl", [ENGLISH.format(n) for n in range(30)])
    curated(tmp_path / "out", path)
    documents = tmp_path / "out" / "documents.jsonl"
    documents.write_bytes(documents.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"documents\.jsonl, line 30: damaged"):
        list(stream_documents(tmp_path / "out"))
