"""Words of many texts at once, each as a 64-bit number: what MinHash, repeated text and decontamination compare.

In: texts. Out: `Words`, a hash for every word in order, where each text's words begin, and where each word stands.

The normalization decides what counts as a duplicate, so it is fixed here and nowhere else:
- Upper case becomes lower case, one code point at a time. The few letters whose lower case takes another number of
  bytes in UTF-8 (such as the Kelvin sign) stay as they are, so every word stands where it stood.
- A word is a run of letters, digits and marks; ASCII: `[0-9a-z]`. Punctuation, spaces, symbols and emoji separate
  (`SEPARATORS`), apostrophes and underscores too.
- In scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese ...) every character is
  a word (`SINGLES`). This goes by the character, never by the document's language.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import xxhash

WORDS_VERSION = 1
"""Raised when another text, or another number, becomes a word's hash; stored hashes are then of no use."""

SEPARATORS: tuple[tuple[int, int], ...] = (
    (0x80, 0xA9), (0xAB, 0xB4), (0xB6, 0xB9), (0xBB, 0xBF), (0xD7, 0xD7), (0xF7, 0xF7),  # Latin-1 punctuation
    (0x37E, 0x37E), (0x387, 0x387), (0x55A, 0x55F), (0x589, 0x58A), (0x5BE, 0x5BE), (0x5C0, 0x5C0),  # Greek ... Hebrew
    (0x5C3, 0x5C3), (0x5F3, 0x5F4), (0x600, 0x60F), (0x61B, 0x61F), (0x66A, 0x66D), (0x6D4, 0x6D4),  # Arabic
    (0x964, 0x965), (0xE3F, 0xE3F), (0xE4F, 0xE4F), (0xE5A, 0xE5B),  # Devanagari, Thai
    (0xF01, 0xF17), (0xF3A, 0xF3D), (0x104A, 0x104F), (0x1361, 0x1368), (0x1400, 0x1400),
    (0x166D, 0x166E), (0x1680, 0x1680), (0x169B, 0x169C), (0x17D4, 0x17D6), (0x17D8, 0x17DB), (0x1800, 0x180E),
    (0x2000, 0x206F), (0x207A, 0x207E), (0x208A, 0x208E), (0x20A0, 0x20CF), (0x2190, 0x245F),  # General Punctuation ...
    (0x2500, 0x2BFF), (0x2E00, 0x2E7F), (0x2FF0, 0x3004), (0x3008, 0x3020), (0x3030, 0x3030), (0x303D, 0x303F),
    (0x30A0, 0x30A0), (0x30FB, 0x30FB), (0xD800, 0xF8FF), (0xFD3E, 0xFD3F), (0xFE00, 0xFE1F), (0xFE30, 0xFE6F),
    (0xFEFF, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65), (0xFFE0, 0xFFFF),
    (0x1F000, 0x1FAFF), (0xE0000, 0x10FFFF),  # emoji; tags and private use
)  # fmt: skip
"""Code points beyond ASCII that end a word: first and last of each range."""

SINGLES: tuple[tuple[int, int], ...] = (
    (0xE01, 0xE3A), (0xE40, 0xE4E), (0xE81, 0xEFF),  # Thai, Lao
    (0xF00, 0xF00), (0xF18, 0xF39), (0xF3E, 0xFFF), (0x1000, 0x1049), (0x1050, 0x109F),  # Tibetan, Burmese
    (0x1780, 0x17D3), (0x17D7, 0x17D7), (0x17DC, 0x17DD), (0x1950, 0x19DF), (0x1A20, 0x1AAF),  # Khmer, Tai
    (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x302F), (0x3031, 0x303C), (0x3041, 0x309F),  # Han, Hiragana
    (0x30A1, 0x30FA), (0x30FC, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),  # Katakana, Bopomofo, Han
    (0xA980, 0xA9DF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F),
    (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Code points that are words by themselves."""

_SEPARATOR, _WORD, _SINGLE = 0, 1, 2
_PIECE = 8
_PIECES = 4
"""Words of up to 32 bytes are hashed eight bytes at a time; longer ones, which are rare, by xxh3."""
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(_PIECE + 1)], dtype=np.uint64)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio
_ODD_2 = np.uint64(0xD6E8FEB86659FD93)
_NEXT_WORD = 0xA0761D6478BD642F
"""What a hash is multiplied by for every word that follows in its n-gram; 3 modulo 4."""
_CASED = 0x1E960  # behind the last letter that has two cases


class Words:
    """The words of some texts.

    Attributes:
        hashes: (n_words,) uint64, one text's words after the other's.
        starts: (n_texts + 1,) int64, where each text's words begin in `hashes`.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        starts: np.ndarray,
        begin: np.ndarray,
        end: np.ndarray,
        data: bytes,
        offsets: np.ndarray,
    ) -> None:
        self.hashes = hashes
        self.starts = starts
        self._begin, self._end, self._data, self._offsets = begin, end, data, offsets

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
        return self._characters(self._begin)

    @functools.cached_property
    def word_end(self) -> np.ndarray:
        """(n_words,) int64: where each word ends in its own text, in characters."""
        return self._characters(self._end)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Every run of n words of each text; of a text that has fewer words, the run of all its words.

        Gram k of a text begins at its word k. So only a text without words is without grams.

        Args:
            n: words in a run.

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

    def _characters(self, places: np.ndarray) -> np.ndarray:
        """Places in the joined bytes as places in each text, in characters."""
        if self._data.isascii():
            return places - np.repeat(self._offsets[:-1], self.counts)
        data = np.frombuffer(self._data, dtype=np.uint8)
        before = np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)])
        return before[places] - np.repeat(before[self._offsets[:-1]], self.counts)


def words_of(texts: Sequence[str]) -> Words:
    """The words of texts, found and hashed together; a million characters in all is a good batch.

    Args:
        texts: any strings, empty ones too.
    """
    encoded = [_encode(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(data) + 1 for data in encoded], dtype=np.int64)]).astype(np.int64)
    # Behind the last text there is room to read a whole piece of its last word.
    data = b"\n".join([*encoded, b""]).lower() + bytes(_PIECE * _PIECES)
    classes = data.translate(_ASCII_CLASSES)
    if data.isascii():
        begin, end = _edges(np.frombuffer(classes, dtype=np.uint8))
    else:
        lowered, marks = bytearray(data), bytearray(classes)
        singles, single_ends = _beyond_ascii(
            np.frombuffer(lowered, dtype=np.uint8), np.frombuffer(marks, dtype=np.uint8)
        )
        data = bytes(lowered)
        begin, end = _edges(np.frombuffer(marks, dtype=np.uint8))
        if len(singles):
            begin = np.sort(np.concatenate([begin, singles]), kind="stable")
            end = np.sort(np.concatenate([end, single_ends]), kind="stable")
    starts = np.searchsorted(begin, offsets)
    return Words(_hashes(data, begin, end), starts, begin, end, data, offsets)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


_ASCII_CLASSES = bytes(_WORD if chr(byte).isalnum() and byte < 128 else _SEPARATOR for byte in range(256))


@functools.cache
def _classes() -> np.ndarray:
    """The class of every code point: (0x110000,) uint8."""
    classes = np.full(0x110000, _WORD, dtype=np.uint8)
    classes[:128] = np.frombuffer(_ASCII_CLASSES, dtype=np.uint8)[:128]
    for ranges, kind in ((SEPARATORS, _SEPARATOR), (SINGLES, _SINGLE)):
        for first, last in ranges:
            classes[first : last + 1] = kind
    return classes


@functools.cache
def _lower_case() -> np.ndarray:
    """The lower case of every code point, where UTF-8 gives it as many bytes: (0x110000,) uint32."""
    lower = np.arange(0x110000, dtype=np.uint32)
    for point in range(0xC0, _CASED):
        letter = chr(point).lower()
        if len(letter) == 1 and ord(letter) != point and len(_encode(letter)) == len(_encode(chr(point))):
            lower[point] = ord(letter)
    return lower


def _beyond_ascii(data: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and classify, in place, what is not ASCII.

    Args:
        data: (n_bytes,) uint8, UTF-8; upper case becomes lower case.
        marks: (n_bytes,) uint8, becomes 1 where a byte belongs to a word of several characters.

    Returns:
        Begins and ends of the characters that are words by themselves, as places in `data`.
    """
    leads = np.flatnonzero(data >= 0xC0)
    first = data[leads]
    begins, ends = [], []
    for size, begin, above in ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0x100)):
        here = leads[(first >= begin) & (first < above)]
        if not len(here):
            continue
        points = data[here].astype(np.uint32) & (0x7F >> size)
        for place in range(1, size):
            points = (points << 6) | (data[here + place] & 0x3F)
        kinds = _classes()[points]
        word = here[kinds == _WORD]
        for place in range(size):
            marks[word + place] = _WORD
        single = here[kinds == _SINGLE]
        begins.append(single)
        ends.append(single + size)
        lowered = _lower_case()[points]
        upper = lowered != points
        _write_utf8(data, here[upper], lowered[upper], size)
    return np.sort(np.concatenate(begins)), np.sort(np.concatenate(ends))


def _write_utf8(data: np.ndarray, places: np.ndarray, points: np.ndarray, size: int) -> None:
    """Write code points of `size` bytes each."""
    for place in range(size - 1, 0, -1):
        data[places + place] = 0x80 | (points & 0x3F)
        points = points >> 6
    lead = (0xFF00 >> size) & 0xFF
    data[places] = lead | points


def _edges(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of the runs of 1; the last byte of `marks` is 0."""
    changes = np.flatnonzero(marks[1:] != marks[:-1]) + 1
    if marks[0]:
        changes = np.concatenate([[0], changes])
    return changes[0::2], changes[1::2]


def _hashes(data: bytes, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """A well mixed hash of each word: h = mix(... mix(mix(piece 0) ^ piece 1) ...), pieces of eight bytes."""
    # Element i of `pieces` is the eight bytes from byte i on.
    pieces = np.ndarray((len(data) - _PIECE + 1,), dtype="<u8", buffer=data, strides=(1,))
    sizes = end - begin
    hashes = pieces[begin] & _MASKS[np.minimum(sizes, _PIECE)]
    _mix(hashes)
    longer = np.flatnonzero(sizes > _PIECE)
    for piece in range(1, _PIECES):
        sizes_left = sizes[longer] - piece * _PIECE
        more = pieces[begin[longer] + piece * _PIECE] & _MASKS[np.minimum(sizes_left, _PIECE)]
        more ^= hashes[longer]
        _mix(more)
        hashes[longer] = more
        longer = longer[sizes_left > _PIECE]
        if not len(longer):
            return hashes
    for place in longer.tolist():
        hashes[place] = xxhash.xxh3_64_intdigest(data[begin[place] : end[place]])
    return hashes


def _mix(values: np.ndarray) -> None:
    """A bijection of 64-bit numbers in which every bit depends on every bit, in place (after MurmurHash3's)."""
    values ^= values >> np.uint64(32)
    values *= _ODD
    values ^= values >> np.uint64(29)
    values *= _ODD_2
    values ^= values >> np.uint64(32)


def run_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """The hash of n words from each word on, whichever texts they stand in: sum of hashes[i + k] · m^k over k < n.

    Args:
        hashes: (n_words,) uint64.
        n: words in a run.

    Returns:
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
