"""Words of many texts at once, each as a 64-bit number: what MinHash, repeated text and decontamination compare.

In: texts. Out: `Words`, a hash for every word in order, where each text's words begin, and where each word stands.

The normalization decides what counts as a duplicate, so it is fixed here and nowhere else:
- Upper case becomes lower case, one code point at a time. The few letters whose lower case takes another number of
  bytes in UTF-8 (such as the Kelvin sign) stay as they are, so every word stands where it stood.
- A word is a run of letters, digits and marks (Unicode's L, N and M; ASCII: `[0-9a-z]`); all else separates.
- Where scripts have no spaces (`UNSPACED`), ICU's dictionaries find the words in each run of their letters. This goes
  by the character, never by the document's language, and it is the same for the quality rules (`split_words`).
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import xxhash
from icu4py import icu_version
from icu4py.breakers import WordBreaker

WORDS_VERSION = f"2 Unicode {unicodedata.unidata_version} ICU {icu_version}"
"""Changes when another text, or another number, becomes a word's hash; stored hashes are then of no use."""

UNSPACED: tuple[tuple[int, int], ...] = (
    (0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai and Lao, Burmese, Khmer
    (0x3005, 0x303C), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),  # Kana, Han
    (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Letters, digits and marks in these ranges belong to scripts without spaces: first and last code point of each."""

_SEPARATOR, _WORD, _UNSPACED = 0, 1, 2
_PIECE = 8
_PIECES = 4
"""Words of up to 32 bytes are hashed eight bytes at a time; longer ones, which are rare, by xxh3."""
PADDING = _PIECE * _PIECES
"""Bytes behind a text, so that a whole piece of its last word can be read."""
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(_PIECE + 1)], dtype=np.uint64)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio
_ODD_2 = np.uint64(0xD6E8FEB86659FD93)
_NEXT_WORD = 0xA0761D6478BD642F
"""What a hash is multiplied by for every word that follows in its n-gram; 3 modulo 4."""


class Words:
    """The words of some texts.

    Attributes:
        hashes: (n_words,) uint64, one text's words after the other's.
        starts: (n_texts + 1,) int64, where each text's words begin in `hashes`.
    """

    def __init__(
        self, data: bytes | memoryview, bounds: np.ndarray, begin: np.ndarray, end: np.ndarray, inner: np.ndarray
    ) -> None:
        """Of UTF-8 in lower case: where texts begin, words begin and end, and bytes inside of characters stand."""
        self.hashes = span_hashes(data, begin, end)
        self.starts = np.searchsorted(begin, bounds)
        self._bounds, self._begin, self._end, self._inner = bounds, begin, end, inner

    @property
    def n_texts(self) -> int:
        """Texts, those without words too."""
        return len(self.starts) - 1

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """(n_texts,) int64: words in each text."""
        return np.diff(self.starts)

    @functools.cached_property
    def word_begin(self) -> np.ndarray:
        """(n_words,) int64: where each word begins in its own text, in characters: `text[begin:end]` is the word."""
        return self._in_own_text(self._begin)

    @functools.cached_property
    def word_end(self) -> np.ndarray:
        """(n_words,) int64: where each word ends in its own text, in characters."""
        return self._in_own_text(self._end)

    def _in_own_text(self, places: np.ndarray) -> np.ndarray:
        characters, bounds = (some - np.searchsorted(self._inner, some) for some in (places, self._bounds[:-1]))
        return characters - np.repeat(bounds, self.counts)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Every run of n words of each text; of a text that has fewer words, the run of all its words.

        Gram k of a text begins at its word k. So only a text without words is without grams.

        Returns:
            (n_grams,) uint64 hashes and (n_texts + 1,) int64 starts of each text's grams among them. Two runs have
            the same hash, whichever texts they stand in, if their words are the same in the same order.
        """
        if n == 1:
            return self.hashes, self.starts
        counts = self.counts
        gram_counts = np.maximum(counts - (n - 1), np.minimum(counts, 1))
        gram_starts = np.concatenate([[0], np.cumsum(gram_counts)])
        runs = run_hashes(self.hashes, n)
        is_gram = np.ones(len(self.hashes), dtype=bool)
        ends = self.starts[1:]
        for back in range(1, n):  # a run that begins so near to the text's end would reach into the next text
            is_gram[(ends - back)[counts >= back]] = False
        is_gram[self.starts[:-1][(counts > 0) & (counts < n)]] = True
        padded = np.concatenate([runs, np.zeros(len(self.hashes) - len(runs), dtype=np.uint64)])
        grams = padded[is_gram]
        for length in np.unique(counts[counts < n]):
            if length:
                short = np.flatnonzero(counts == length)
                grams[gram_starts[short]] = _combined(self.hashes, self.starts[short], int(length))
        return grams, gram_starts


def words_of(texts: Sequence[str]) -> Words:
    """The words of texts, found and hashed together; a million characters in all is a good batch."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    bounds = np.cumsum([0, *(len(data) + 1 for data in encoded)], dtype=np.int64)
    data = b"\n".join([*encoded, b""]).lower()
    if data.isascii():
        begin, end = _edges(np.frombuffer(data.translate(_ASCII_CLASSES), dtype=np.bool_))
        return Words(data + bytes(PADDING), bounds, begin, end, np.empty(0, dtype=np.int64))
    marks, lowered = (
        np.frombuffer(bytearray(some), dtype=np.uint8)
        for some in (data.translate(_ASCII_CLASSES), data + bytes(PADDING))
    )
    beyond = np.flatnonzero(lowered >= 0x80)  # bytes of characters beyond ASCII
    is_lead = lowered[beyond] >= 0xC0
    codes = np.frombuffer(_recoded(lowered[beyond].tobytes(), "utf-8", "utf-32-le"), dtype="<u4")
    classes = _CLASSES[codes]
    marks[beyond] = classes[np.cumsum(is_lead) - 1]
    lowered[beyond] = np.frombuffer(_recoded(_LOWER_CASE[codes].tobytes(), "utf-32-le", "utf-8"), dtype=np.uint8)
    begin, end = _edges(marks != _SEPARATOR)
    unspaced = np.flatnonzero(classes == _UNSPACED)
    if len(unspaced):
        leads = np.append(np.flatnonzero(is_lead), len(beyond))
        places, ends = beyond[leads[unspaced]], beyond[leads[unspaced + 1] - 1] + 1
        is_first, is_last = _run_borders(places, ends)
        letters = codes[unspaced].tobytes().decode("utf-32-le")
        runs = [letters[a:b] for a, b in itertools.pairwise([*np.flatnonzero(is_first).tolist(), len(letters)])]
        first, last, inner = places[is_first], ends[is_last], places[_inner_words(runs)]
        inner = np.concatenate([first[marks[first - 1] == _WORD], inner, last[marks[last] == _WORD]])
        begin, end = merged(begin, inner), merged(end, inner)
    return Words(lowered.data, bounds, begin, end, beyond[~is_lead])


def _recoded(data: bytes, before: str, after: str) -> bytes:
    return data.decode(before, "surrogatepass").encode(after, "surrogatepass")


class CharacterTable:
    """A number for every character, found when the character first comes: most of Unicode never does.

    `value_of` gives it, below the greatest number that the unsigned `dtype` can hold.
    """

    def __init__(self, value_of: Callable[[str], int], dtype: type[np.unsignedinteger] = np.uint8) -> None:
        self._value_of, self._unknown = value_of, np.iinfo(dtype).max
        self._values = np.full(0x110000, self._unknown, dtype)

    def __getitem__(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of these code points."""
        found = self._values[codes]
        unknown = codes[found == self._unknown]
        if not len(unknown):
            return found
        for code in set(unknown.tolist()):
            self._values[code] = self._value_of(chr(code))
        return self._values[codes]


_ASCII_CLASSES = bytes(_WORD if chr(byte).isalnum() and byte < 128 else _SEPARATOR for byte in range(256))


def _class_of(character: str) -> int:
    is_selector = unicodedata.name(character, "").startswith("VARIATION SELECTOR")  # how an emoji looks
    if is_selector or unicodedata.category(character)[0] not in "LMN":
        return _SEPARATOR
    return _UNSPACED if any(first <= ord(character) <= last for first, last in UNSPACED) else _WORD


def _lower_case_of(character: str) -> int:
    """The code of its lower case, where UTF-8 gives that as many bytes."""
    lower = character.lower()
    n_bytes, n_before = (len(some.encode("utf-8", "surrogatepass")) for some in (lower, character))
    return ord(lower if len(lower) == 1 and n_bytes == n_before else character)


_CLASSES, _LOWER_CASE = CharacterTable(_class_of), CharacterTable(_lower_case_of, np.uint32)


def _edges(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of the runs of True; the last of `marks` is False."""
    edges = np.flatnonzero(marks[1:] != marks[:-1]) + 1
    if len(marks) and marks[0]:
        edges = np.concatenate([[0], edges])
    return edges[0::2], edges[1::2]


def merged(places: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Rising places with a few more among them: sorting them all would take longer than all else here."""
    more = np.sort(more)
    return np.insert(places, np.searchsorted(places, more), more)


def _run_borders(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool: which letters are the first of their run, and which the last, by where each begins and ends."""
    is_first = np.append(True, begins[1:] != ends[:-1])
    return is_first, np.append(is_first[1:], True)


def _inner_words(runs: Sequence[str]) -> np.ndarray:
    """Which letters of these runs, counted through, begin a word although they are not the first of their run.

    All runs are one text for ICU, which takes far longer to begin than to go on; it never looks beyond a line break.
    """
    lengths = np.array([len(run) for run in runs])
    firsts = np.cumsum(lengths + 1) - (lengths + 1)
    ends = np.cumsum([len(word) for word in WordBreaker("\n".join(runs), "en")])
    run = np.searchsorted(firsts, ends, side="right") - 1
    place = ends - firsts[run]
    return (ends - run)[(place > 0) & (place < lengths[run])]  # as many line breaks as runs stand before it


def span_hashes(data: bytes | memoryview, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """A well mixed hash of each run of bytes: h = mix(... mix(mix(piece 0) ^ piece 1) ...), pieces of eight bytes.

    Behind the last run there must be `PADDING` bytes more. Zeros at the end of a run are not told apart from its end.
    """
    # Element i of `pieces` is the eight bytes from byte i on.
    pieces = np.ndarray((len(data) - _PIECE + 1,), dtype="<u8", buffer=data, strides=(1,))
    sizes = end - begin
    hashes = pieces[begin] & _MASKS.take(sizes, mode="clip")
    mix(hashes)
    longer = np.flatnonzero(sizes > _PIECE)
    for piece in range(1, _PIECES):
        sizes_left = sizes[longer] - piece * _PIECE
        more = pieces[begin[longer] + piece * _PIECE] & _MASKS.take(sizes_left, mode="clip")
        more ^= hashes[longer]
        mix(more)
        hashes[longer] = more
        longer = longer[sizes_left > _PIECE]
        if not len(longer):
            return hashes
    for place in longer.tolist():
        hashes[place] = xxhash.xxh3_64_intdigest(data[begin[place] : end[place]])
    return hashes


def mix(values: np.ndarray) -> None:
    """A bijection of 64-bit numbers in which every bit depends on every bit, in place (after MurmurHash3's)."""
    values ^= values >> np.uint64(32)
    values *= _ODD
    values ^= values >> np.uint64(29)
    values *= _ODD_2
    values ^= values >> np.uint64(32)


def split_words(text: str) -> list[str]:
    """The words of a text as the quality rules count them: what stands between white space, cut at `word_breaks`."""
    if text.isascii():
        return text.split()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    breaks = word_breaks(text, np.flatnonzero(is_unspaced(codes)))
    return " ".join(text[begin:end] for begin, end in itertools.pairwise([0, *breaks, len(text)])).split()


def is_unspaced(codes: np.ndarray) -> np.ndarray:
    """Which of these code points are letters, digits or marks of scripts without spaces."""
    return np.equal(_CLASSES[codes], _UNSPACED)


def word_breaks(text: str, places: np.ndarray) -> list[int]:
    """Where a word begins although there is no white space before it: rising places in a text.

    So it is at the words of scripts without spaces, and at what follows their letters. Punctuation belongs to the word
    before it, an opening bracket or quotation mark to the one behind. `places`, (n,): where such letters stand, rising.
    """
    if not len(places):
        return []
    is_first, is_last = _run_borders(places, places + 1)
    runs = list(zip(places[is_first].tolist(), (places[is_last] + 1).tolist(), strict=True))
    breaks = set(places[_inner_words([text[begin:end] for begin, end in runs])].tolist())
    for begin, end in runs:
        follows = _FOLLOWING_WORD.match(text, end)
        for place in (begin, follows.end() if follows else begin):
            while place and unicodedata.category(text[place - 1]) in ("Ps", "Pi"):
                place -= 1
            breaks.add(place)
    return sorted(place for place in breaks if place and not text[place - 1].isspace())


_FOLLOWING_WORD = re.compile(r"[^\w\s]*(?=\w)")


def run_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """The hash of n words from each word on, whichever texts they stand in: sum of hashes[i + k] · m^k over k < n.

    (max(n_words - n + 1, 0),) uint64, modulo 2⁶⁴; runs of 2, 4, 8 ... words are made of two halves.
    """
    if len(hashes) < n:
        return np.empty(0, dtype=np.uint64)
    power, length = hashes, 1  # runs of `length` words, a power of two
    total, covered = np.zeros(len(hashes), dtype=np.uint64), 0
    while True:
        if n & length:
            shifted = power[covered:] * _power(covered)
            total = total[: len(shifted)] + shifted
            covered += length
        if covered == n:
            return total[: len(hashes) - n + 1]
        power = power[:-length] + power[length:] * _power(length)
        length *= 2


def _combined(hashes: np.ndarray, begins: np.ndarray, n: int) -> np.ndarray:
    """As `run_hashes`, for the runs that begin at `begins`."""
    total = np.zeros(len(begins), dtype=np.uint64)
    for place in range(n):
        total += hashes[begins + place] * _power(place)
    return total


@functools.cache
def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_NEXT_WORD, exponent, 1 << 64))


def set_bits(field: np.ndarray, hashes: np.ndarray) -> None:
    """Mark hashes in a field of bits, (a power of two,) uint8: `has_bits` then dismisses nearly all other hashes."""
    bits = hashes >> np.uint64(65 - (8 * len(field)).bit_length())
    np.bitwise_or.at(field, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))


def has_bits(field: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """(n,) bool: which hashes may be among those that are marked in the field."""
    bits = hashes >> np.uint64(65 - (8 * len(field)).bit_length())
    return (field[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8) & 1).astype(bool)
