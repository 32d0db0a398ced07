"""The hold-out: decided by the id alone, never an empty part, the same however the documents were spread."""

import pickle
import random
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.document import Document, text_id
from groundup.corpus.holdout import AUTO_DOCUMENTS, Holdout
from groundup.corpus.write import Merge, merge_range
from groundup.errors import DataError
from groundup.recipe import CorpusSettings

IDS = st.lists(st.integers(0, 2**128 - 1).map("{:032x}".format), min_size=2, max_size=60, unique=True)


def holdout_of(ids: list[str], by: str = "document", share: float = 0.1) -> Holdout:
    holdout = Holdout(CorpusSettings(validation_by=by, validation_share=share))
    for one in ids:
        holdout.see(one)
    return holdout


def document(identity: str, text: str = "text") -> Document:
    return Document(id=identity, text=text, source="s")


@given(IDS, st.floats(0.001, 0.999))
def test_no_part_is_ever_empty(ids: list[str], share: float) -> None:
    holdout = holdout_of(ids, share=share)
    splits = [holdout.split_of(one) for one in ids]
    assert {"train", "validation"} == set(splits)
    if holdout.moved:
        assert min(splits.count("train"), splits.count("validation")) == 1
        assert "the one that comes nearest was put there" in holdout.moved


@given(IDS, st.floats(0.001, 0.999), st.integers(1, 5), st.randoms())
def test_workers_that_saw_parts_agree_with_one_that_saw_all(
    ids: list[str], share: float, n_workers: int, shuffler: random.Random
) -> None:
    alone = holdout_of(ids, share=share)
    parts = [holdout_of(ids[worker::n_workers], share=share) for worker in range(n_workers)]
    shuffler.shuffle(parts)
    merged = holdout_of([], share=share)
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    again = pickle.loads(pickle.dumps(merged))
    assert [again.split_of(one) for one in ids] == [alone.split_of(one) for one in ids]
    assert again.moved == alone.moved


def test_the_share_is_met_and_the_others_do_not_matter() -> None:
    ids = [text_id(f"document {number}") for number in range(5000)]
    holdout = holdout_of(ids, share=0.2)
    held_out = [one for one in ids if holdout.split_of(one) == "validation"]
    assert abs(len(held_out) - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5
    assert holdout.moved is None
    half = holdout_of(ids[::2], share=0.2)
    assert [half.split_of(one) for one in ids[::2]] == [holdout.split_of(one) for one in ids[::2]]
    more = holdout_of(ids, share=0.3)
    assert all(more.split_of(one) == "validation" for one in held_out)


def test_the_order_of_ids_says_nothing_about_the_split() -> None:
    ids = sorted(text_id(f"document {number}") for number in range(5000))
    holdout = holdout_of(ids, share=0.2)
    first = sum(holdout.split_of(one) == "validation" for one in ids[:1000])
    assert 100 < first < 300


def test_copies_fall_to_the_side_of_their_original(tmp_path: Path) -> None:
    ids = sorted(text_id(f"document {number}") for number in range(200))
    rest = {"source": "s", "language": "en", "url": ""}
    lines = b"".join(orjson.dumps({"id": one, **rest, "text": one}) + b"\n" for one in ids)
    (tmp_path / "unit.jsonl").write_bytes(lines)
    holdout = holdout_of(ids, share=0.5)
    pieces = [(str(tmp_path / "unit.jsonl"), 0, len(lines))]
    merge_range(Merge(pieces, str(tmp_path / "out.jsonl"), holdout, {"s": 3.0}))
    written = [orjson.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert len({copy["id"] for copy in written}) == 600
    assert all(copy["split"] == holdout.split_of(copy["text"]) for copy in written)


@pytest.mark.parametrize(("ids", "by"), [([], "tail"), (["a"], "tail"), (["a"] * 50, "tail")])
def test_what_cannot_be_divided_loses_its_tails(ids: list[str], by: str) -> None:
    assert holdout_of(ids, by="auto").by == by
    with pytest.raises(DataError, match=r"(?s)not two different documents.*'tail'"):
        assert holdout_of(ids, by="document").by


def test_auto_counts_the_documents_of_all_workers() -> None:
    ids = [text_id(str(number)) for number in range(AUTO_DOCUMENTS)]
    holdout = holdout_of(ids[:7], by="auto")
    assert holdout.by == "tail"
    holdout.merge(holdout_of(ids[7:], by="auto"))
    assert holdout.by == "document"


@given(st.text(alphabet="ab \n", min_size=2, max_size=300), st.floats(0.05, 0.9))
def test_a_tail_loses_nothing_but_blanks(text: str, share: float) -> None:
    holdout = holdout_of([], by="tail", share=share)
    parts = holdout.divide(document("0" * 32, text))
    assert "".join("".join(part.text for part in parts).split()) == "".join(text.split())
    assert [part.split for part in parts] in (["train"], ["train", "validation"])
    assert len({part.id for part in parts}) == len(parts)
    assert parts[0].id == "0" * 32
    if len(parts) == 2:  # cut at a border at most a quarter of the tail too early; blanks at the cut belong to neither
        tail = len(text) - round(len(text) * (1 - share))
        blanks = len(text) - sum(len(part.text) for part in parts)
        assert tail - blanks - 1 <= len(parts[1].text) <= 1.25 * tail + 2
