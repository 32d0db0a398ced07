"""Characters of newer Unicode than some engine knows: where two engines may cut a text differently.

A split regex asks whether a character is a letter, a number or white space. Whether U+088F is a letter depends on the
engine's tables: Unicode 17 says so, 16 does not know it. Such characters are rare; texts that have one are found
here from their bytes, fast enough to look at every text before the fastest engine gets it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

_KNOWN_PLANES = 0x30000  # characters behind are all counted as newer: there are few, and they are seldom used
_FIRST_BYTE = 0xCD  # begins U+0340 and on; every character before is assigned for good
_OLDEST_TABLES = 16


class NewerCharacters:
    """The code points that no Unicode up to 16, the oldest of any engine here, has assigned.

    Python's own table says which, while it is not newer than that itself; the one of Unicode 3.2, which every Python
    has too, always does.
    """

    def __init__(self) -> None:
        is_older = int(unicodedata.unidata_version.split(".")[0]) <= _OLDEST_TABLES
        category = unicodedata.category if is_older else unicodedata.ucd_3_2_0.category
        table = [category(chr(point)) == "Cn" for point in range(_KNOWN_PLANES)]
        self._is_newer = np.array([*table, True])  # (n + 1,) bool, the last for all that follow
        self._may_begin = _first_two_bytes(self._is_newer)

    def places(self, texts: Sequence[str], blobs: Sequence[bytes]) -> list[int]:
        """Which of the texts (`blobs`: their UTF-8) have such a character."""
        places = [place for place, text in enumerate(texts) if not text.isascii()]
        data = np.frombuffer(b"".join([*(blobs[place] for place in places), b"\0\0\0"]), dtype=np.uint8)
        leads = np.flatnonzero(data >= _FIRST_BYTE)
        leads = leads[self._may_begin[data[leads].astype(np.uint16) << 8 | data[leads + 1]]]
        if not len(leads):
            return []
        found = leads[self._is_newer[np.minimum(_code_points(data, leads), _KNOWN_PLANES)]]
        ends = np.cumsum([len(blobs[place]) for place in places])
        return [places[place] for place in np.unique(np.searchsorted(ends, found, side="right"))]


def _code_points(data: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """The characters that begin at `leads` in UTF-8 `data`, all of two bytes or more, (n_leads,) int32."""
    first = data[leads].astype(np.int32)
    second = (data[leads + 1] & 0x3F).astype(np.int32)
    points = (first & 0x1F) << 6 | second
    is_long = first >= 0xE0
    third = (data[leads[is_long] + 2] & 0x3F).astype(np.int32)
    points[is_long] = (first[is_long] & 0x0F) << 12 | second[is_long] << 6 | third
    is_longest = first >= 0xF0
    at = leads[is_longest]
    third = (data[at + 2] & 0x3F).astype(np.int32)
    points[is_longest] = (first[is_longest] & 0x07) << 18 | second[is_longest] << 12 | third << 6 | data[at + 3] & 0x3F
    return points


def _first_two_bytes(is_newer: np.ndarray) -> np.ndarray:
    """Which pairs of bytes begin the UTF-8 of such a character, (65536,) bool: most texts need no further look."""
    found = np.zeros(1 << 16, dtype=bool)
    points = np.flatnonzero(is_newer)
    for mark, least, most, shift in ((0xC0, 0x80, 0x7FF, 0), (0xE0, 0x800, 0xFFFF, 6), (0xF0, 0x10000, 0x10FFFF, 12)):
        heads = points[(points >= least) & (points <= most)] >> shift  # the bits of the first two bytes
        found[(mark | heads >> 6) << 8 | 0x80 | heads & 0x3F] = True
    found[(0xF0 | _KNOWN_PLANES >> 18) << 8 :] = True
    return found
