"""A sample of a corpus that a trainer can hold: within a budget of bytes, every source with its share.

Texts are cut into pieces of some eight thousand characters; the pieces whose hash is lowest are kept, as many
as fit. A piece's hash is made of its document's id and its number, so the sample does not depend on the order
of the documents, and every source keeps its share of the text, up to the variance of a random sample. No source
needs a pass of its own: what is held never grows beyond the budget.

The budget also keeps the trainers' counts in range. Both count pairs of neighbours in 32 bits and would overflow
silently (huggingface/tokenizers issue 1170). No pair stands more often in a text than the text has bytes, so fewer
than 2^31 bytes can never overflow: `COUNTABLE_BYTES` is the most that any trainer is given.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator

import xxhash

from groundup.corpus.document import Document, text_id
from groundup.tokenizer.split import cut_into_pieces, replace_surrogates

COUNTABLE_BYTES = 2**31 - 1
"""A text of so many bytes has at most 2^31 - 2 pairs of neighbours, which a signed 32-bit counter can hold."""

SAMPLE_CHARACTERS = 1 << 13
_LONGEST_RUN = 1 << 20  # characters without any place where a split is sure to cut
_LONG_WORD = re.compile(r"[^\W\d_]{256}|\s{256}|\d{256}|(?:(?!\s)[\W_]){256}")
_MAY_BE_LONG = re.compile(r"\S{256}|\s{256}")
_RARE_WORD = re.compile(r"[^\W\d_]{25,}|(?:(?!\s)[\W_]){25,}")
RARE_WORD_BYTES = 1 << 18
"""Of different words of more than 24 characters, which are mostly no words, so much is enough to learn from."""


class Sample:
    """What to train on, chosen in one pass.

    Args:
        most_bytes: UTF-8 bytes to hold at most; never more than `COUNTABLE_BYTES`.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = min(most_bytes, COUNTABLE_BYTES)
        self.seen_bytes = 0
        """Bytes of all texts."""
        self.kept_bytes = 0
        """Bytes of the pieces that are held."""
        self.left_out_bytes = 0
        """Bytes of long words that `pieces_of_words` has left out."""
        self._heap: list[tuple[int, bytes]] = []  # the piece with the highest hash on top
        self._below = 1 << 64  # pieces from this hash on are left out for good

    @property
    def is_whole(self) -> bool:
        """Whether every text was kept."""
        return self.kept_bytes == self.seen_bytes

    def add(self, document: Document | str) -> None:
        """Look at one document; a plain text is its own id."""
        text = document if isinstance(document, str) else document.text
        name = text_id(replace_surrogates(text)) if isinstance(document, str) else document.id
        for number, piece in enumerate(_pieces(text)):
            value = piece.encode()
            self.seen_bytes += len(value)
            key = xxhash.xxh3_64_intdigest(f"{name}:{number}".encode())
            if key < self._below:
                heapq.heappush(self._heap, (-key, value))
                self.kept_bytes += len(value)
                self._shrink()

    def pieces(self) -> Iterator[str]:
        """The chosen pieces, which are forgotten as they are given out: the trainer needs the memory."""
        while self._heap:
            yield self._heap.pop()[1].decode()

    def pieces_of_words(self) -> Iterator[str]:
        """As `pieces`, with a bounded amount of different long words: Unigram's trainer takes a minute a MB.

        What was given once is given again at no cost.
        """
        seen: set[str] = set()
        room = RARE_WORD_BYTES

        def kept(word: re.Match[str]) -> str:
            nonlocal room
            if word[0] not in seen:
                room -= len(word[0].encode())
                if room < 0:
                    self.left_out_bytes += len(word[0].encode())
                    return " "
                seen.add(word[0])
            return word[0]

        for piece in self.pieces():
            yield _RARE_WORD.sub(kept, piece)

    def _shrink(self) -> None:
        # The highest hashes are dropped, and with them every piece of an equal or a higher one that is still to come:
        # what remains is the longest beginning of the pieces in the order of their hashes that fits, in any order.
        while self.kept_bytes > self.most_bytes and len(self._heap) > 1:
            self._below = -self._heap[0][0]
            while self._heap and -self._heap[0][0] >= self._below:
                self.kept_bytes -= len(heapq.heappop(self._heap)[1])


def sample(documents: Iterable[Document | str], most_bytes: int) -> Sample:
    """Choose what to train on; see `Sample`."""
    chosen = Sample(most_bytes)
    for document in documents:
        chosen.add(document)
    return chosen


def _pieces(text: str) -> Iterator[str]:
    """Pieces without a very long word: trainers take the square of its length, or overflow the stack."""
    for piece in cut_into_pieces(replace_surrogates(text), SAMPLE_CHARACTERS):
        ends = [match.end() for match in _LONG_WORD.finditer(piece)] if _MAY_BE_LONG.search(piece) else []
        for start, end in itertools.pairwise([0, *ends, len(piece)]):
            for place in range(start, end, _LONGEST_RUN):
                yield piece[place : min(end, place + _LONGEST_RUN)]
