"""Decontamination: what repeats evaluation data is found and named, what only sounds alike is left, in every format."""

import bz2
import csv
import gzip
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from groundup.corpus.decontaminate import COMMON_TEXTS, ContaminationCounts, EvaluationIndex, Match, find_tasks
from groundup.errors import DataError

NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()  # noqa: SIM905
QUESTION = "If a train leaves Berlin at nine and travels north at sixty miles an hour, when does it reach Hamburg?"
PIECE = "train leaves Berlin at nine and travels north at sixty miles an hour"  # 13 words of it


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def index_of(folder: Path, records: Iterable[Any], ngram: int = 13) -> EvaluationIndex:
    return EvaluationIndex.build([write_jsonl(folder / "quiz.jsonl", records)], ngram, folder / "index")


@pytest.fixture
def index(tmp_path: Path) -> EvaluationIndex:
    return index_of(tmp_path, [{"question": "Who?"}, {"question": QUESTION, "choices": ["noon", "at ten"]}])


@pytest.mark.parametrize(
    "text",
    [
        PIECE, QUESTION, PIECE.upper(), PIECE.replace(" ", "\n\n"), PIECE.replace(" ", ", "), f"“{PIECE}”!",
        f"{'a b c ' * 50}{PIECE}{' d e f' * 50}", f"Überall 日本 {PIECE} 日本",
    ],
)  # fmt: skip
def test_thirteen_words_in_a_row_are_found_however_they_are_set(index: EvaluationIndex, text: str) -> None:
    [[match]] = index.find([text])
    assert (match.task, match.record) == ("quiz", 2)
    assert re.sub(r"\W+", " ", match.text.lower()) in re.sub(r"\W+", " ", QUESTION.lower())
    assert match.n_words >= 13
    assert match.text in text


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "…", "Who?", PIECE.rsplit(" ", 1)[0], PIECE.replace("Berlin", "Bonn"), PIECE.replace("north ", ""),
        " ".join(reversed(PIECE.split())), PIECE.replace(" nine", "nine"), "at ten",
    ],
)  # fmt: skip
def test_less_or_other_is_not(index: EvaluationIndex, text: str) -> None:
    assert index.find([text]) == [[]]


def test_the_share_is_that_of_the_words_covered(tmp_path: Path) -> None:
    index = index_of(tmp_path, [{"q": PIECE}, {"q": f"so {PIECE}"}, {"q": " ".join(NUMBERS)}])
    text = f"{'x ' * 26}{PIECE}{' y' * 13}"
    [[one, two]] = index.find([text])
    assert (one.record, two.record) == (1, 2)
    assert one.share == two.share == pytest.approx(13 / 52)
    text = f"{PIECE} {PIECE} {' '.join(NUMBERS)}"
    [matches] = index.find([text])
    assert [(match.record, match.n_words, match.share) for match in matches] == [
        (1, 13, 1.0),
        (2, 13, 1.0),
        (3, 16, 1.0),
    ]
    assert matches[2].text == " ".join(NUMBERS)


def test_the_longest_run_is_shown(tmp_path: Path) -> None:
    index = index_of(tmp_path, [{"q": QUESTION}])
    text = f"{PIECE}. And again: {QUESTION}"
    [[match]] = index.find([text])
    assert match.text == QUESTION[:-1]
    assert match.n_words == 20


def test_short_strings_count_whole_from_eight_words_on(tmp_path: Path) -> None:
    eight, seven, twelve = " ".join(NUMBERS[:8]), " ".join(NUMBERS[4:11]), " ".join(["zero", *NUMBERS[:11]])
    index = index_of(tmp_path, [{"choices": [["a", eight]]}, {"choices": [seven]}, {"choices": [twelve]}])
    found = index.find([f"so {eight} then", f"so {seven} then", f"so {twelve} then", twelve[5:], eight[4:]])
    assert [[match.record for match in matches] for matches in found] == [[1], [], [1, 3], [1], []]
    assert [match.n_words for match in found[2]] == [8, 12]


def test_the_wording_of_instructions_is_ignored_but_not_what_is_asked(tmp_path: Path) -> None:
    fixed = "Read the passage below with care and then choose the one answer that fits the question best of all"
    random_words = random.Random(1)
    asked = [" ".join(random_words.choices(NUMBERS, k=30)) for _ in range(COMMON_TEXTS + 1)]
    index = index_of(tmp_path, [{"q": f"{fixed}: {question}"} for question in asked])
    assert index.find([fixed, f"They wrote: {fixed}. And more."]) == [[], []]
    assert [len(matches) for matches in index.find(asked)] == [1] * len(asked)
    few = index_of(tmp_path / "few", [{"q": f"{fixed}: {question}"} for question in asked[:COMMON_TEXTS]])
    assert len(few.find([fixed])[0]) == COMMON_TEXTS


def test_a_passage_that_many_questions_share_is_no_instruction(tmp_path: Path) -> None:
    records = [{"passage": QUESTION, "question": f"Number {number}?"} for number in range(3 * COMMON_TEXTS)]
    [matches] = index_of(tmp_path, records).find([QUESTION])
    assert [match.record for match in matches] == list(range(1, 3 * COMMON_TEXTS + 1))


def test_runs_of_numbers_are_no_evidence(tmp_path: Path) -> None:
    numbers = " ".join(map(str, range(1, 40)))
    index = index_of(tmp_path, [{"q": f"{numbers} is how to count"}, {"q": QUESTION}])
    assert index.find([numbers, f"x {numbers} y"]) == [[], []]
    assert len(index.find([f"{' '.join(map(str, range(34, 40)))} is how to count 1 2 3"])[0]) == 0
    sums = "Tom has 12 pens and 30 cards so he has 42 things in 2 bags"
    assert len(index_of(tmp_path / "sums", [{"q": sums}]).find([sums])[0]) == 1


def test_every_format_gives_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"q": "Who was it?", "more": ["a", "b"]}, {"q": QUESTION, "more": ["noon", " ".join(NUMBERS)]}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(data))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "e.json").write_text(json.dumps(rows))
    (tmp_path / "f.json").write_text(json.dumps({"version": 1, "data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "g.parquet")
    for name, delimiter in (("h.csv", ","), ("i.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as handle:
            csv.writer(handle, delimiter=delimiter).writerows([row["q"], *row["more"]] for row in rows)
    (tmp_path / "j.txt").write_text(
        f"Who was it? a\nb\n\n \n{QUESTION.replace(' north', chr(10) + 'north')}\n{' '.join(NUMBERS)}\n"
    )
    files = [path for path in sorted(tmp_path.iterdir()) if path.is_file()]
    index = EvaluationIndex.build(files, 13, tmp_path / "index")
    assert index.tasks == {**dict.fromkeys(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], 2)}
    for text in (f"so {QUESTION}", " ".join(NUMBERS)):
        [matches] = index.find([text])
        assert [(match.task, match.record) for match in matches] == [(task, 2) for task in index.tasks]


def test_folders_globs_and_names_of_tasks(tmp_path: Path) -> None:
    for name in ("gsm8k/test.jsonl", "gsm8k/train.jsonl", "mmlu/test/law.csv", "mmlu/val/law.csv", "arc.jsonl"):
        write_jsonl(tmp_path / name, [{"q": QUESTION}])
    (tmp_path / "mmlu" / "README.txt").write_text("Permission is hereby granted, free of charge, to any person")
    (tmp_path / "mmlu" / ".hidden.jsonl").write_text("{")
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "test.txt").write_text(QUESTION)
    names = ["arc", "gsm8k/test", "gsm8k/train", "test/law", "val/law"]
    for named in ([tmp_path], [f"{tmp_path}/*", tmp_path / "arc.jsonl"]):
        assert sorted(task.name for task in find_tasks(named)) == [*names, "wiki/test"]
    assert [task.name for task in find_tasks([f"{tmp_path}/**/l*.csv"])] == ["test/law", "val/law"]
    assert [task.name for task in find_tasks([tmp_path / "mmlu" / "README.txt"])] == ["README"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b'{"q": "fine"}\n{"q": \n', r"x\.jsonl, line 2: invalid JSON"),
        ("x.json", b"[" * 100_000, r"x\.json, record 1: invalid JSON: .*recursion"),
        ("x.json", b"{", r"x\.json, record 1: invalid JSON"),
        ("x.csv", b'a,"b" c', r"x\.csv, row 1: invalid CSV"),
        ("x.txt", b"\xff", r"x\.txt: cannot be read \('utf-8'"),
        ("x.jsonl.gz", gzip.compress(b'{"q": "a"}\n' * 1000, mtime=0)[:-20], "cut off"),
        ("x.jsonl.gz", b"not gzip", "not a gzip file"),
        ("x.parquet", b"PAR1", r"x\.parquet: damaged file"),
        ("x.jsonl", b'{"q": "too short to be looked for"}\n', r"(?s)no string in .*x\.jsonl has 8 words"),
        ("x.jsonl", b"", "no string in"),
        ("x.html", b"<p>", r"no evaluation data in .*x\.html"),
    ],
)
def test_bad_evaluation_data_is_refused_by_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        EvaluationIndex.build([tmp_path / name], 13, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with pytest.raises(DataError, match=r"missing\*: nothing matches"):
        find_tasks([tmp_path / "missing*"])


def test_depth_and_lone_surrogates_are_no_obstacle(tmp_path: Path) -> None:
    deep: Any = QUESTION
    for _ in range(200):
        deep = [{"x": deep}]
    index = index_of(tmp_path, [deep, {"q": "\ud800 is half a pair, and here are some more words to make it long"}])
    assert [[match.record for match in found] for found in index.find([QUESTION, "\udfff " + QUESTION])] == [[1], [1]]


def plain_matches(evaluation: list[list[str]], text: str, ngram: int) -> dict[int, int]:
    """The same by sets of tuples, without hashes: record number to longest run."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    longest: dict[int, int] = {}
    for number, strings in enumerate(evaluation, start=1):
        for string in strings:
            theirs = re.findall(r"[a-z0-9]+", string.lower())
            size = min(ngram, len(theirs))
            if size < min(ngram, 8):
                continue
            runs = {tuple(theirs[at : at + size]) for at in range(len(theirs) - size + 1)}
            hits = [at for at in range(len(words) - size + 1) if tuple(words[at : at + size]) in runs]
            best = end = begin = -1
            for at in hits:
                begin = at if at >= end else begin
                end = at + size
                best = max(best, end - begin)
            if best > 0:
                longest[number] = max(longest.get(number, 0), best)
    return longest


WORDS = st.lists(st.sampled_from("abcd"), max_size=30).map(" ".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([["a b c d a b c d"]], ["a b c d a b c d", "x"], 9)
@given(
    st.lists(st.lists(WORDS, max_size=3), min_size=1, max_size=5),
    st.lists(WORDS, max_size=6),
    st.integers(5, 15),
)
def test_it_finds_what_a_plain_search_finds(
    tmp_path: Path, evaluation: list[list[str]], texts: list[str], ngram: int
) -> None:
    try:
        index = index_of(tmp_path, evaluation, ngram)
    except DataError:
        assert all(len(string.split()) < min(ngram, 8) for strings in evaluation for string in strings)
        return
    for text, matches in zip(texts, index.find(texts), strict=True):
        assert {match.record: match.n_words for match in matches} == plain_matches(evaluation, text, ngram)
        assert all(match.text in text for match in matches)


def test_texts_do_not_depend_on_their_neighbours(index: EvaluationIndex) -> None:
    chooser = random.Random(3)
    texts = [" ".join(chooser.choices(NUMBERS + QUESTION.split(), k=chooser.randrange(200))) for _ in range(200)]
    texts[50] = texts[150] = f"{QUESTION} {texts[50]}"
    texts[99] = "x " * 600_000 + QUESTION
    together = index.find(texts)
    assert together == [index.find([text])[0] for text in texts]
    assert [place for place, matches in enumerate(together) if matches] == [50, 99, 150]


def test_counts_are_the_same_in_any_order() -> None:
    def match(task: str, record: int) -> Match:
        return Match(task, record, f"words of {record}", 13, 0.5)

    found = {
        "d1": [match("arc", 1), match("arc", 2)], "d2": [match("arc", 2), match("gsm8k", 7)], "d3": [match("gsm8k", 7)],
    }  # fmt: skip
    alone, one, two = ContaminationCounts(), ContaminationCounts(), ContaminationCounts()
    for document, matches in found.items():
        alone.add(document, matches)
        (one if document == "d2" else two).add(document, matches)
    one.merge(two)
    summary = one.summary({"arc": 100, "gsm8k": 50, "piqa": 10})
    assert summary == alone.summary({"arc": 100, "gsm8k": 50, "piqa": 10})
    assert summary["arc"] | {"examples": 0} == {"records": 100, "records_hit": 2, "documents": 2, "examples": 0}
    assert summary["gsm8k"]["documents"] == 2
    assert summary["gsm8k"]["records_hit"] == 1
    assert summary["piqa"] == {"records": 10, "records_hit": 0, "documents": 0, "examples": []}
    assert summary["arc"]["examples"][0] == {"document": "d1", "record": 1, "text": "words of 1"}


def test_real_overlaps_of_books_and_evaluation_sets(tmp_path: Path, shared_data: Path) -> None:
    """Two records of LAMBADA stand in the Oz books; by 13-grams nothing else of these sets does."""
    evaluation = shared_data / "evaluation"
    names = ("lambada_openai", "boolq", "piqa", "arc_easy", "arc_challenge")
    files = [evaluation / "multiple_choice" / f"{name}.jsonl" for name in names]
    index = EvaluationIndex.build([*files, evaluation / "gsm8k" / "test.jsonl"], 13, tmp_path / "index")
    with (shared_data / "classics" / "default_medium.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for line in lines]
    found = [match for matches in index.find(texts) for match in matches]
    assert [(match.task, match.record) for match in found] == [("lambada_openai", 3490), ("lambada_openai", 4156)]
    assert all("shaggy man" in match.text for match in found)


def test_real_overlaps_of_web_pages_and_mmlu(tmp_path: Path, shared_data: Path) -> None:
    """A speech on the moon stands in a government page and in four questions, an enacting clause in three."""
    index = EvaluationIndex.build([shared_data / "evaluation" / "mmlu" / "test"], 13, tmp_path / "index")
    texts = []
    for name in ("raw-00", "raw-01"):
        with gzip.open(shared_data / "raw_web" / f"{name}.jsonl.gz", "rt") as lines:
            texts += [
                text for text in (json.loads(line)["text"] for line in lines) if "the moon" in text or "enacted" in text
            ]
    counts = ContaminationCounts()
    for number, matches in enumerate(index.find(texts)):
        counts.add(f"{number:06d}", matches)
    hit = {task: found["records_hit"] for task, found in counts.summary(index.tasks).items() if found["records_hit"]}
    assert hit == {"high_school_us_history_test": 4, "high_school_world_history_test": 3}
