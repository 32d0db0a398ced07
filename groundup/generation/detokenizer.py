"""Tokens to text, one at a time: text is given out only when later tokens cannot change it.

A token can end in the middle of a character, and a stop text in the middle of a token: incomplete UTF-8 is held
back, and so is any end of the text that may yet grow into a stop text.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from groundup.tokenizer import Tokenizer


class Detokenizer:
    """The text of one row, as far as it is certain.

    The text ends before the stop text that is complete first (of several that end at the same character, before
    the longest): where tokens begin and end makes no difference.

    Args:
        tokenizer: of the model.
        stop: texts before which the text ends.
        shown: control tokens that stand in the text by their names.

    Attributes:
        offsets: for each token, how many characters of the text were complete before it. Of tokens that end in
            the middle of a character, the next one has the same offset; from a stop text on they pass the text's end.
        stopped: whether a stop text was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), shown: Collection[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._shown = {tokenizer.control_tokens[name]: name.encode() for name in shown}
        # What the text may not end with while more can follow.
        self._beginnings = {text[:size] for text in self._stop for size in range(1, len(text))}
        self._most_held = max(map(len, self._beginnings), default=0)
        # Bytes that are not UTF-8 become U+FFFD; an incomplete character waits for its other bytes.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, not yet given out
        self._given_out: list[str] = []
        self._n_decoded = 0
        self.offsets: list[int] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self._given_out)

    def add(self, token: int) -> str:
        """Take a token; return what text became certain."""
        if self.stopped:
            return ""
        self.offsets.append(self._n_decoded)
        decoded = self._decoder.decode(self._shown.get(token) or self._tokenizer.token_bytes(token))
        self._n_decoded += len(decoded)
        self._held += decoded
        found = [(place + len(text), place) for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:  # the one that is complete first
            self.stopped = True
            certain, self._held = self._held[: min(found)[1]], ""
        else:
            sizes = range(min(self._most_held, len(self._held)), 0, -1)
            cut = len(self._held) - next((size for size in sizes if self._held[-size:] in self._beginnings), 0)
            certain, self._held = self._held[:cut], self._held[cut:]
        self._given_out.append(certain)
        return certain

    def finish(self) -> str:
        """No token follows: return what was held back; a character that was cut off in its middle is left out."""
        rest, self._held = self._held, ""
        self._given_out.append(rest)
        return rest
