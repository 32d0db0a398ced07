"""The quality classifier: it learns what is there to learn, nothing from noise, and the same thing every time."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples

import groundup.corpus.quality.classifier as module
from groundup.corpus.quality.classifier import Classifier
from groundup.errors import ArtifactError, DataError

COMMON = [f"w{number}" for number in range(300)]


def sentences(n: int, words: list[str], seed: int, size: int = 60) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(COMMON + 9 * words, k=size)) for _ in range(n)]


@pytest.fixture(scope="module")
def kinds() -> tuple[list[str], list[str]]:
    return sentences(300, ["castle", "river"], 1), sentences(200, ["cookie", "login"], 2)


@pytest.fixture(scope="module")
def model(kinds: tuple[list[str], list[str]]) -> Classifier:
    return Classifier.train(*kinds, seed=3)


def test_it_learns_to_tell_two_kinds_apart(model: Classifier) -> None:
    assert (model.report["positive"], model.report["negative"]) == (300, 200)
    assert 20 < model.report["held_out"] < 90
    assert model.report["auc"] > 0.9
    assert model.report["accuracy"] > 0.8
    castle, cookie = model.score(["the castle by the river " * 9, "login to accept a cookie " * 9])
    assert castle > 0.6 > 0.4 > cookie


def test_word_order_is_seen_in_pairs() -> None:
    chooser = random.Random(5)

    def texts(pair: str) -> list[str]:
        return [
            " ".join(pair if chooser.random() < 0.3 else chooser.choice(COMMON) for _ in range(60)) for _ in range(200)
        ]

    model = Classifier.train(texts("red blue"), texts("blue red"))
    assert model.report["auc"] > 0.9


def test_classics_and_raw_web_pages_are_told_apart(shared_data: Path) -> None:
    with (shared_data / "classics" / "default_medium.jsonl").open() as lines:
        classics = [json.loads(line)["text"] for line in lines]
    with (shared_data / "raw_web" / "raw-small.jsonl").open() as lines:
        web = [json.loads(line)["text"] for line in lines]
    report = Classifier.train(classics, web).report
    assert report["auc"] > 0.95
    assert report["accuracy"] > 0.9


def test_nothing_is_learnt_from_random_labels() -> None:
    texts = sentences(1200, [], 7, size=40)
    report = Classifier.train(texts[::2], texts[1::2]).report
    assert abs(report["auc"] - 0.5) < 5 * (1 / (12 * 60)) ** 0.5


def test_the_held_out_texts_are_not_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(400, [], 8)
    seen: list[int] = []
    fit = module._fit
    monkeypatch.setattr(module, "_fit", lambda kinds, seed: seen.extend(map(len, kinds)) or fit(kinds, seed))
    report = Classifier.train(texts[::2], texts[1::2]).report
    assert sum(seen) + report["held_out"] == 400


def test_equal_examples_in_any_order_give_equal_bits(kinds: tuple[list[str], list[str]], model: Classifier) -> None:
    positive, negative = kinds
    shuffled = random.Random(9).sample(positive, len(positive))
    again = Classifier.train(iter(shuffled + shuffled[:20]), negative[::-1], seed=3)
    probe = positive[:20] + negative[:20]
    assert again.score(probe).tobytes() == model.score(probe).tobytes()
    assert again.report == model.report
    other = Classifier.train(positive, negative, seed=4)
    assert other.score(probe).tobytes() != model.score(probe).tobytes()


def test_a_model_reads_back_equal(tmp_path: Path, kinds: tuple[list[str], list[str]], model: Classifier) -> None:
    model.save(tmp_path)
    back = Classifier.load(tmp_path)
    assert back.score(kinds[0]).tobytes() == model.score(kinds[0]).tobytes()
    assert back.report == model.report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.json", "weights.npy"]


def test_damaged_models_are_refused(tmp_path: Path, model: Classifier) -> None:
    with pytest.raises(ArtifactError, match="not found"):
        Classifier.load(tmp_path)
    model.save(tmp_path)
    weights = (tmp_path / "weights.npy").read_bytes()
    flipped = weights[:5000] + bytes([weights[5000] ^ 1]) + weights[5001:]
    for damaged in (weights[:1000], b"", b"x" * 100, flipped):
        (tmp_path / "weights.npy").write_bytes(damaged)
        with pytest.raises(ArtifactError, match="weights"):
            Classifier.load(tmp_path)
    np.save(tmp_path / "weights.npy", np.zeros(5, dtype=np.float32))
    with pytest.raises(ArtifactError, match="not the weights that were saved"):
        Classifier.load(tmp_path)
    about = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps({**about, "version": 0}))
    with pytest.raises(ArtifactError, match="another version"):
        Classifier.load(tmp_path)


@pytest.mark.parametrize("empty", [[], [""], ["…!?", "   "]])
def test_a_kind_without_words_is_refused(empty: list[str]) -> None:
    with pytest.raises(DataError, match=r"negative: there is no text"):
        Classifier.train(sentences(30, [], 1), empty)


@settings(max_examples=examples(25))
@given(texts=st.lists(st.text(max_size=80), max_size=12))
def test_a_score_is_a_probability_that_depends_on_its_text_alone(model: Classifier, texts: list[str]) -> None:
    together = model.score(texts)
    assert together.dtype == np.float32
    assert together.shape == (len(texts),)
    assert ((together >= 0) & (together <= 1)).all()
    alone = np.array([model.score([text])[0] for text in texts], dtype=np.float32)
    assert together.tobytes() == alone.tobytes()


def test_a_long_text_counts_as_one_and_much_text_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sentences(200, ["castle"], 11)
    book = " ".join(sentences(300, ["cookie", "castle"], 12))
    model = Classifier.train([*texts, book], sentences(200, ["cookie"], 13))
    assert model.score(["castle " * 20])[0] > 0.5
    monkeypatch.setattr(module, "MOST_WORDS", 3000)
    few = Classifier.train(texts, sentences(200, ["cookie"], 13))
    assert few.report["positive"] <= 3000 // 60 + 1
    again = Classifier.train(texts[::-1], sentences(200, ["cookie"], 13)[::-1])
    assert again.report == few.report


def test_one_million_characters_and_compressed_examples(shared_data: Path) -> None:
    """Batches end at a million characters; what is scored must not show where."""
    with gzip.open(shared_data / "raw_web" / "raw-01.jsonl.gz", "rt") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(600)]
    assert sum(map(len, texts)) > 1.5 * 2**20
    model = Classifier.train(texts[:100], texts[100:200])
    whole = model.score(texts)
    parts = np.concatenate([model.score(texts[:77]), model.score(texts[77:])])
    assert whole.tobytes() == parts.tobytes()
