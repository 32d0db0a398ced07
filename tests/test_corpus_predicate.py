"""A predicate of the user's own: loaded from its file, and clear about what is wrong with it."""

from pathlib import Path

import pytest

from groundup.corpus.document import Document
from groundup.corpus.quality.predicate import load_predicate, predicate_fingerprint
from groundup.errors import DataError

DOCUMENT = Document("ab" * 16, "some text", "pages.jsonl")


def write(path: Path, body: str) -> str:
    path.write_text(body, encoding="utf-8")
    return f"{path}:keep"


def test_it_keeps_or_not(tmp_path: Path) -> None:
    keep = load_predicate(write(tmp_path / "mine.py", "def keep(document):\n    return 'text' in document.text\n"))
    assert keep(DOCUMENT) is True
    assert keep(Document("cd" * 16, "nothing", "x")) is False


def test_numpy_booleans_count(tmp_path: Path) -> None:
    keep = load_predicate(write(tmp_path / "mine.py", "import numpy as np\ndef keep(d):\n    return np.bool_(False)\n"))
    assert keep(DOCUMENT) is False


def test_two_files_of_one_name_stay_two(tmp_path: Path) -> None:
    specs = []
    for name, answer in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        specs.append(write(tmp_path / name / "mine.py", f"ANSWER = {answer}\ndef keep(d):\n    return ANSWER\n"))
    assert [load_predicate(spec)(DOCUMENT) for spec in specs] == [True, False]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "not a file and a function"),
        (":keep", "not a file and a function"),
        ("mine.py:", "not a file and a function"),
        ("mine.py:not a name", "not a file and a function"),
        ("nowhere.py:keep", "there is no file"),
        ("words.txt:keep", "not a Python file"),
        ("mine.py:kept", r"has no function 'kept'.\nIt has: keep"),
        ("mine.py:NUMBER", "has no function 'NUMBER'"),
        ("empty.py:keep", r"has no function 'keep'.\nWrite: def keep"),
        ("broken.py:keep", "fails .SyntaxError"),
        ("raises.py:keep", "fails .KeyError: 'x'"),
        ("exits.py:keep", "fails .SystemExit: 0"),
    ],
)
def test_what_is_wrong_is_said(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.py", "NUMBER = 1\ndef keep(d):\n    return True\n")
    write(tmp_path / "words.txt", "keep")
    write(tmp_path / "empty.py", "")
    write(tmp_path / "broken.py", "def keep(:\n")
    write(tmp_path / "raises.py", "{}['x']\n")
    write(tmp_path / "exits.py", "raise SystemExit(0)\n")
    with pytest.raises(DataError, match=message):
        load_predicate(spec)


@pytest.mark.parametrize(
    ("body", "message"), [("return 1 / 0", "fails on document .*ZeroDivisionError"), ("pass", "returns None for")]
)
def test_a_failure_names_the_document(body: str, message: str, tmp_path: Path) -> None:
    keep = load_predicate(write(tmp_path / "mine.py", f"def keep(document):\n    {body}\n"))
    with pytest.raises(DataError, match=message) as raised:
        keep(DOCUMENT)
    assert DOCUMENT.id in str(raised.value)
    assert "pages.jsonl" in str(raised.value)


def test_its_fingerprint_is_of_what_the_file_says(tmp_path: Path) -> None:
    spec = write(tmp_path / "mine.py", "def keep(d):\n    return True\ndef other(d):\n    return True\n")
    first = predicate_fingerprint(spec)
    assert predicate_fingerprint(spec) == first
    assert predicate_fingerprint(spec.replace(":keep", ":other")) != first
    write(tmp_path / "mine.py", "def keep(d):\n    return False\n")
    assert predicate_fingerprint(spec) != first
    with pytest.raises(DataError, match="there is no file"):
        predicate_fingerprint(f"{tmp_path / 'gone.py'}:keep")
