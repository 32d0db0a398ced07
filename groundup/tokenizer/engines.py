"""Which engine encodes: the fastest one installed that gives the same ids as Hugging Face `tokenizers`.

The file `tokenizer.json` means what `tokenizers` makes of it. Two engines do byte-level BPE faster, tiktoken
about four times and gigatoken twenty times; each must first give equal ids on a thousand adversarial texts. One that is
missing or fails is passed over, and the reason is kept. All take texts and give one flat array: no list of
numbers in Python for gigatoken, a short-lived one for the others.

Why tiktoken needs no merges: it merges any two neighbours whose bytes joined are a token, the one
with the lowest id first. If every merge makes a new token and ids are in the order of the merges, as a
trainer leaves them, only the pair that made a token can ever meet (whatever stands around a token's bytes cannot
change what happens inside before its last merge), so both do the same. `_ranks` checks this.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import psutil
from tokenizers import Tokenizer as HuggingFace

from groundup.batches import batches
from groundup.environment import usable_cores
from groundup.errors import DataError
from groundup.tokenizer.adversarial import adversarial_texts
from groundup.tokenizer.letters import LETTERS, unspelled
from groundup.tokenizer.split import PATTERNS, cut_into_pieces, replace_surrogates
from groundup.untrusted import reading

ENGINES = ("gigatoken", "tiktoken", "huggingface")
"""In the order in which they are tried."""

N_SAMPLES = 1000
_BATCH_BYTES = 1 << 22
_BATCH_CHARACTERS = 1 << 20  # what Hugging Face's engine is given at once: it holds some 200 bytes a character
_LONGEST_PIECE = 1 << 18  # longer runs of white space overflow the stack of tiktoken's regex
_LOOKED_AFTER_BYTES = 64 << 20
_MOST_GROWTH_BYTES = 256 << 20
_KNOWN_PLANES = 0x30000  # characters behind are all counted as newer: there are few, and they are seldom used
_FIRST_BYTE = 0xCD  # begins U+0340 and on; every character before is assigned for good
_OLDEST_TABLES = 16

Arrays = tuple[np.ndarray, np.ndarray]
"""ids, (n_tokens,) uint32, one text after the other, and each text's number of tokens, (n_texts,) int64."""


class Encoder(Protocol):
    """Texts to ids."""

    name: str

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Ids of each text. A lone surrogate counts as U+FFFD."""


def choose(spec: dict[str, Any], reference: Encoder) -> tuple[Encoder, list[str]]:
    """The fastest encoder that gives the same ids as Hugging Face's, and why faster ones were passed over.

    Args:
        spec: what encodes text, as `text_spec` makes it.
        reference: Hugging Face's engine made of it, or what encodes characters.
    """
    if spec["model"]["type"] != "BPE":
        return reference, []
    passed_over = []
    texts = adversarial_texts(N_SAMPLES, seed=0)
    expected = reference.encode(texts)
    for kind in (GigatokenEncoder, TiktokenEncoder):
        try:
            with reading(kind.name, DataError):  # whatever an engine throws on a tokenizer that it does not know
                candidate = kind(spec, reference)
                found = candidate.encode(texts)
        except DataError as error:
            why = error.__cause__
            known = (
                "is not installed" if isinstance(why, ImportError) else f"does not take this tokenizer ({why!s:.120})"
            )
            passed_over.append(f"{kind.name} {known}")
        else:
            if all(map(np.array_equal, found, expected)):
                return candidate, passed_over
            passed_over.append(f"{kind.name} gave other ids in the self-test")
    return reference, passed_over


class HuggingFaceEncoder:
    """Hugging Face's engine, with which the others are compared; `cut` gives pieces with the ids of the whole."""

    name = "huggingface"

    def __init__(self, engine: HuggingFace, cut: Callable[[str], Iterable[str]] = cut_into_pieces) -> None:
        self._engine, self._cut = engine, cut

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Ids of each text. A lone surrogate counts as U+FFFD."""

        pieces = ((place, piece) for place, text in enumerate(texts) for piece in self._cut(replace_surrogates(text)))

        def encoded() -> Iterator[tuple[int, list[int]]]:
            for batch in batches(pieces, _BATCH_CHARACTERS, lambda item: len(item[1])):
                found = self._engine.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
                yield from ((place, encoding.ids) for (place, _), encoding in zip(batch, found, strict=True))

        return _arrays(len(texts), encoded())


class CharacterEncoder:
    """One id a character, and one for any other."""

    name = "groundup"

    def __init__(self, ids: dict[str, int], unknown: int) -> None:
        self._ids = np.full(0x110000, unknown, dtype=np.uint32)
        self._ids[[ord(character) for character in ids]] = list(ids.values())

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Ids of each text."""
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return self._ids[points], lengths


class TiktokenEncoder:
    """tiktoken with the tokenizer's ranks and regex; ValueError: the tokenizer is not one that ranks describe."""

    name = "tiktoken"

    def __init__(self, spec: dict[str, Any], fallback: Encoder) -> None:
        import tiktoken

        self._fallback = fallback
        self._encoding = tiktoken.Encoding(
            "groundup", pat_str=_pattern(spec), mergeable_ranks=_ranks(spec), special_tokens={}
        )

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Ids of each text. A lone surrogate counts as U+FFFD."""
        others = []

        def encoded() -> Iterator[tuple[int, list[int]]]:
            for place, text in enumerate(texts):
                pieces = [text] if len(text) <= _LONGEST_PIECE else list(cut_into_pieces(text))
                if max(map(len, pieces)) > _LONGEST_PIECE:
                    others.append(place)
                    continue
                # One after the other: its threads wait for each other to make their lists, and take twice the time.
                yield from ((place, self._encoding.encode_ordinary(replace_surrogates(piece))) for piece in pieces)

        ids, lengths = _arrays(len(texts), encoded())
        if not others:
            return ids, lengths
        return _merged(ids, lengths, others, self._fallback.encode([texts[place] for place in others]))


class GigatokenEncoder:
    """gigatoken with the tokenizer's own file; it keeps what it has merged before, so later batches are faster.

    Its tables of Unicode are newer than the other engines'; texts where that may matter go to `fallback`: a split regex
    asks whether a character is a letter, and U+088F is one since Unicode 17, while 16 does not know it.
    """

    name = "gigatoken"

    def __init__(self, spec: dict[str, Any], fallback: Encoder) -> None:
        import gigatoken

        self._fallback = fallback
        _pattern(spec)
        self._contents = json.dumps(spec, ensure_ascii=False)
        self._make: Callable[[str], Any] = gigatoken.Tokenizer.from_json
        self._n_bytes = self._memory_at_first = 0
        self._renew()

    def encode(self, texts: Sequence[str]) -> Arrays:
        """Ids of each text. A lone surrogate counts as U+FFFD."""
        parallel = _threads() > 1
        all_ids, all_lengths = [np.empty(0, dtype=np.uint32)], [np.empty(0, dtype=np.int64)]
        first = 0
        for blobs in batches(map(_utf8, texts), _BATCH_BYTES, len):
            unknown = with_newer_characters(blobs)
            for place in unknown:
                blobs[place] = b""
            encoded = self._tokenizer.encode_batch(blobs, parallel=parallel).layout
            offsets = np.asarray(encoded.offsets.data).astype(np.int64, copy=False)
            ids = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]].astype(np.uint32, copy=False)
            lengths = np.diff(offsets)
            if unknown:
                more = self._fallback.encode([texts[first + place] for place in unknown])
                ids, lengths = _merged(ids, lengths, unknown, more)
            all_ids.append(ids)
            all_lengths.append(lengths)
            first += len(blobs)
            self._n_bytes += sum(map(len, blobs))
            if self._n_bytes >= _LOOKED_AFTER_BYTES:  # text without repetition would fill any memory with its cache
                self._n_bytes = 0
                if _memory_bytes() - self._memory_at_first > _MOST_GROWTH_BYTES:
                    self._renew()
        return np.concatenate(all_ids), np.concatenate(all_lengths)

    def _renew(self) -> None:
        self._tokenizer = self._make(self._contents)
        self._n_bytes, self._memory_at_first = 0, _memory_bytes()


def _arrays(n_texts: int, encoded: Iterable[tuple[int, Sequence[int]]]) -> Arrays:
    """Of each text's place and the ids of its next piece."""
    flat = array("I")
    lengths = np.zeros(n_texts, dtype=np.int64)
    for place, ids in encoded:
        flat.extend(ids)
        lengths[place] += len(ids)
    return np.frombuffer(flat, dtype=np.uint32), lengths


def _merged(ids: np.ndarray, lengths: np.ndarray, places: list[int], more: Arrays) -> Arrays:
    """Put in the ids of the texts at `places`, which have none yet."""
    more_ids, more_lengths = more
    ends = np.cumsum(lengths)
    where = np.repeat(ends[places], more_lengths)
    lengths = lengths.copy()
    lengths[places] = more_lengths
    return np.insert(ids, where, more_ids), lengths


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return replace_surrogates(text).encode()


def with_newer_characters(blobs: Sequence[bytes]) -> list[int]:
    """Which texts, given as UTF-8, have a character that no Unicode up to 16 has assigned."""
    places = [place for place, blob in enumerate(blobs) if not blob.isascii()]
    data = np.frombuffer(b"".join([blobs[place] for place in places]), dtype=np.uint8)
    if data.max(initial=0) < _FIRST_BYTE:
        return []
    is_newer = _newer_characters()
    high = np.flatnonzero(data >= 0x80)
    points = np.frombuffer(data[high].tobytes().decode().encode("utf-32-le"), dtype="<u4")
    found = is_newer[np.minimum(points, len(is_newer) - 1)]
    if not found.any():
        return []
    begins = high[data[high] >= 0xC0][found]
    ends = np.cumsum([len(blobs[place]) for place in places])
    return [places[place] for place in np.unique(np.searchsorted(ends, begins, side="right"))]


@functools.cache
def _newer_characters() -> np.ndarray:
    """By code point, whether no Unicode up to 16, the oldest of any engine here, has assigned it; the last for all on.

    Python's own table says which, while it is not newer than that itself; the one of Unicode 3.2, which every Python
    has too, always does.
    """
    is_older = int(unicodedata.unidata_version.split(".")[0]) <= _OLDEST_TABLES
    category = unicodedata.category if is_older else unicodedata.ucd_3_2_0.category
    return np.array([*(category(chr(point)) == "Cn" for point in range(_KNOWN_PLANES)), True])


def _threads() -> int:
    """As many threads as other engines of this kind would use; one in a worker process."""
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return 1 if multiprocessing.parent_process() is not None else usable_cores()


def _pattern(spec: dict[str, Any]) -> str:
    """The regex that cuts the text.

    Raises:
        ValueError: text is cut or changed in a way that the fast engines do not know.
    """
    cutting = spec["pre_tokenizer"]
    steps = cutting["pretokenizers"] if cutting["type"] == "Sequence" else [cutting]
    types = [step["type"] for step in steps]
    if spec.get("normalizer") is not None or spec["model"].get("ignore_merges") or spec["model"].get("dropout"):
        raise ValueError("it changes the text or its merges")
    if types == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return PATTERNS["gpt2"]
    known = types == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
    if not known or steps[1]["use_regex"] or steps[1]["add_prefix_space"]:
        raise ValueError(f"it cuts text by {types}")
    return str(steps[0]["pattern"]["Regex"])


def _ranks(spec: dict[str, Any]) -> dict[bytes, int]:
    """Each token's bytes and its id.

    Raises:
        ValueError: the ids are not in the order of the merges.
    """
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    merges = spec["model"]["merges"]
    first = len(vocabulary) - len(merges)
    for place, merge in enumerate(merges):
        if vocabulary.get("".join(merge)) != first + place:
            raise ValueError("its ids are not in the order of its merges")
    return {unspelled(token): index for token, index in vocabulary.items() if index >= first - len(LETTERS)}


def _memory_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
