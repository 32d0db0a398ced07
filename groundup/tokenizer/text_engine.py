"""The engine that encodes text: a `tokenizer.json` without whatever could put a control token into the ids of a text.

Three parts of such a file can: added tokens, which are searched for in every text; the model's own vocabulary, in
which control tokens stand beside words; and the post-processor, which adds tokens around a text. So the post-processor
is left out, and every control token is renamed to something that no text can contain, as it is drawn at random when the
file is loaded. Whatever a normalizer or pre-tokenizer makes of a text, the model then knows no way to a control token.

Also left out: truncation, padding, and dropout, with which the same text would have other ids every time. And as the
file may come from anybody, how much longer its parts can make a text is bounded.
"""

from __future__ import annotations

import base64
import math
import secrets
from collections.abc import Callable, Collection
from typing import Any

from groundup.errors import DataError
from groundup.tokenizer.files import engine_of, steps_of

MOST_GROWTH = 64
"""So many characters may become of one. Unicode's own forms make up to 18."""

_CHUNK = 1024
_LARGEST_CHANGE = {"NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Lowercase": 3, "BertNormalizer": 18, "ByteLevel": 2}
_NOTHING = {"type": "BPE", "vocab": {}, "merges": []}


def text_spec(spec: dict[str, Any], control: Collection[str]) -> dict[str, Any]:
    """What encodes text.

    Args:
        spec: the contents of `tokenizer.json`, as the engine writes them.
        control: names of the control tokens.

    Raises:
        ValueError: its pre-tokenizer or decoder can make too much of a text.
    """
    for part in ("pre_tokenizer", "decoder"):
        if _growth(spec.get(part)) > MOST_GROWTH:
            raise ValueError(f"its {part} can make more than {MOST_GROWTH} characters of one")
    key = secrets.token_hex(16)
    hidden = {name: f"{key} {place}" for place, name in enumerate(control)}
    model = {**spec["model"], "dropout": None} if "dropout" in spec["model"] else dict(spec["model"])
    if isinstance(model["vocab"], dict):
        known = set(model["vocab"])
        model["vocab"] = {hidden.get(token, token): index for token, index in model["vocab"].items()}
    else:  # Unigram's
        known = {token for token, _ in model["vocab"]}
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        mark = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if hidden.keys().isdisjoint((left, right, left + right, left + right.removeprefix(mark)))
        ]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    added = [
        {**token, "content": hidden.get(token["content"], token["content"])}
        for token in spec["added_tokens"]
        if token["content"] not in hidden or token["content"] not in known  # those behind the vocabulary keep their ids
    ]
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**spec, "model": model, "added_tokens": added, **nothing}


def growth_check(normalizer: dict[str, Any] | None) -> Callable[[str], None]:
    """What raises a DataError for a text that the normalizer would make too long; it is quick for all usual ones.

    Raises:
        ValueError: a step of the normalizer alone can make too much of one character.
    """
    steps = steps_of(normalizer)
    if any(_growth(step) > _CHUNK for step in steps):
        raise ValueError(f"its normalizer can make more than {_CHUNK} characters of one")
    if math.prod(map(_growth, steps)) <= MOST_GROWTH:
        return lambda text: None
    made = [engine_of({"model": _NOTHING, "normalizer": step}).normalizer for step in steps]

    def check(text: str) -> None:
        for start in range(0, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK]
            for step in made:
                chunk = step.normalize_str(chunk)
                if len(chunk) > MOST_GROWTH * _CHUNK:
                    raise DataError(
                        f"the tokenizer's normalizer makes more than {MOST_GROWTH} characters of one.",
                        "Do not trust the source of this tokenizer.",
                    )

    return check


def _growth(part: dict[str, Any] | None) -> float:
    """How many characters a part can make of one, at most."""
    steps = steps_of(part)
    if part is None or len(steps) != 1:
        return math.prod(map(_growth, steps))
    step = steps[0]
    if step["type"] == "Replace":
        found = step["pattern"].get("String")
        n_found = len(found) if found else 1
        return max(1.0, len(step["content"]) / n_found) + (not found and len(step["content"]) > 0)
    if step["type"] == "Prepend":
        return 1 + len(step["prepend"])
    if step["type"] == "Precompiled":
        table = base64.b64decode(step["precompiled_charsmap"] or "")
        made = table[4 + int.from_bytes(table[:4], "little") :].decode("utf-8", errors="replace").split("\0")
        return max(map(len, made))
    return _LARGEST_CHANGE.get(step["type"], 1)
