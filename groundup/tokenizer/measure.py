"""What a tokenizer makes of a corpus: bytes per token by language and source, fertility, which tokens are used and
which never.

In: a tokenizer and documents. Out: a `Measured` of plain values, which the terminal, the page and JSON all show.
Fertility is tokens per word, words being what white space separates (Rust et al. 2021, arXiv:2012.15613, section 4);
it says little where a language does not write spaces, bytes per token always does.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from groundup.corpus.document import Document
from groundup.errors import DataError
from groundup.tokenizer.known import KNOWN
from groundup.tokenizer.pieces import Piece, cut, piece_of
from groundup.tokenizer.split import replace_surrogates
from groundup.tokenizer.tokenizer import Tokenizer

MOST_BYTES = 64 << 20
"""How much text is enough to measure by."""

MOST_GROUPS = 30
"""So many languages or sources are listed; smaller ones are counted together."""

OTHERS = "(others)"
N_LONGEST = 40
N_UNUSED = 60
N_FREQUENT = 40
N_SAMPLES = 8
SAMPLE_CHARACTERS = 280
_GROUP_BYTES = 4 << 20
_CURVE_POINTS = 120
_COUNTS = ("documents", "bytes", "words", "tokens")


@dataclass
class TextGroup:
    """A language, a source, or all text.

    Attributes:
        name: of the language or source.
        documents: how many.
        bytes: UTF-8 bytes.
        words: what white space separates.
        tokens: of this tokenizer.
        known_tokens: of the well-known tokenizers that are at hand, by name.
    """

    name: str
    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    known_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for, on average."""
        return self.bytes / max(1, self.tokens)

    @property
    def fertility(self) -> float:
        """Tokens that a word takes, on average."""
        return self.tokens / max(1, self.words)

    def known_bytes_per_token(self) -> dict[str, float]:
        """The same figure for the well-known tokenizers."""
        return {name: self.bytes / max(1, count) for name, count in self.known_tokens.items()}

    def add(self, other: TextGroup) -> None:
        """Count another group in."""
        for name in (*_COUNTS, "known_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Sampled:
    """The beginning of a document, cut into tokens."""

    source: str
    language: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Measured:
    """What a tokenizer makes of a text.

    Attributes:
        tokenizer: kind, vocab_size, control_tokens, fingerprint.
        total: all of the text.
        languages: largest first, at most `MOST_GROUPS` and the others.
        sources: likewise.
        not_at_hand: well-known tokenizers that tiktoken does not have on this machine.
        unused: how many tokens, control tokens aside, never occur.
        unused_examples: some of them, the ones learned first in front.
        longest: the longest tokens, and how often each occurs.
        frequent: the most frequent tokens, and how often each occurs.
        curve: (rank, occurrences) of the used tokens, from the most frequent on, at some ranks.
        samples: beginnings of documents of different languages and sources.
    """

    tokenizer: dict[str, Any]
    total: TextGroup
    languages: list[TextGroup]
    sources: list[TextGroup]
    not_at_hand: list[str]
    unused: int
    unused_examples: list[Piece]
    longest: list[tuple[Piece, int]]
    frequent: list[tuple[Piece, int]]
    curve: list[tuple[int, int]]
    samples: list[Sampled]


def measure(tokenizer: Tokenizer, documents: Iterable[Document], most_bytes: int = MOST_BYTES) -> Measured:
    """Look at documents until there is enough.

    Args:
        tokenizer: whose tokens.
        documents: a corpus; the documents of a run come in the order of their ids, so its beginning is a fair sample.
        most_bytes: of text; what comes behind is not read.

    Raises:
        DataError: there is no text.
    """
    counters = {known.name: known.counter() for known in KNOWN}
    at_hand = {name: counter for name, counter in counters.items() if counter is not None}
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    languages: dict[str, TextGroup] = {}
    sources: dict[str, TextGroup] = {}
    total = TextGroup("all")
    samples: dict[tuple[str, str], Document] = {}
    for some in _groups(documents, most_bytes):
        ids, found = _measure_some(tokenizer, some, at_hand)
        counts += np.bincount(ids, minlength=len(counts))
        for document, group in zip(some, found, strict=True):
            total.add(group)
            languages.setdefault(document.language or "?", TextGroup(document.language or "?")).add(group)
            sources.setdefault(document.source, TextGroup(document.source)).add(group)
            if len(samples) < 50 * N_SAMPLES:
                samples.setdefault((document.language, document.source), document)
    if not total.bytes:
        raise DataError("tokenizer report: there is no text to measure by.", "Name text files with --text.")
    return Measured(
        tokenizer={
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "control_tokens": len(tokenizer.special_ids),
            "fingerprint": tokenizer.fingerprint,
        },
        total=total,
        languages=_largest(languages),
        sources=_largest(sources),
        not_at_hand=[name for name in counters if name not in at_hand],
        samples=_samples(tokenizer, samples),
        **_tokens(tokenizer, counts),
    )


def to_json(measured: Measured) -> dict[str, Any]:
    """For programs."""

    def group(item: TextGroup) -> dict[str, Any]:
        plain = {name: getattr(item, name) for name in ("name", *_COUNTS, "bytes_per_token")}
        return {**plain, "tokens_per_word": item.fertility, "bytes_per_token_of": item.known_bytes_per_token()}

    def counted(items: list[tuple[Piece, int]]) -> list[dict[str, Any]]:
        return [{"id": piece.id, "shown": piece.shown, "count": count} for piece, count in items]

    return {
        "tokenizer": measured.tokenizer,
        "total": group(measured.total),
        "languages": [group(item) for item in measured.languages],
        "sources": [group(item) for item in measured.sources],
        "not_available_offline": measured.not_at_hand,
        "unused": measured.unused,
        "unused_examples": [{"id": piece.id, "shown": piece.shown} for piece in measured.unused_examples],
        "longest": counted(measured.longest),
        "frequent": counted(measured.frequent),
        "frequency_curve": [list(point) for point in measured.curve],
        "samples": [
            {"source": item.source, "language": item.language, "pieces": [piece.shown for piece in item.pieces]}
            for item in measured.samples
        ],
    }


def _groups(documents: Iterable[Document], most_bytes: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = seen = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        seen += len(document.text.encode("utf-8", errors="replace"))
        if seen >= most_bytes:
            break
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _measure_some(
    tokenizer: Tokenizer, documents: Sequence[Document], at_hand: dict[str, Callable[[Sequence[str]], list[int]]]
) -> tuple[np.ndarray, list[TextGroup]]:
    texts = [replace_surrogates(document.text) for document in documents]
    ids, lengths = tokenizer.encode_to_arrays(texts)
    known = {name: counter(texts) for name, counter in at_hand.items()}
    return ids, [
        TextGroup(
            "",
            1,
            len(text.encode()),
            len(text.split()),
            int(lengths[place]),
            Counter({name: counts[place] for name, counts in known.items()}),
        )
        for place, text in enumerate(texts)
    ]


def _largest(groups: dict[str, TextGroup]) -> list[TextGroup]:
    ordered = sorted(groups.values(), key=lambda group: (-group.bytes, group.name))
    listed, rest = ordered[:MOST_GROUPS], ordered[MOST_GROUPS:]
    if rest:
        others = TextGroup(f"{OTHERS}: {len(rest)}")
        for group in rest:
            others.add(group)
        listed.append(others)
    return listed


def _tokens(tokenizer: Tokenizer, counts: np.ndarray) -> dict[str, Any]:
    """What is known of the tokens by how often each occurs."""
    unused = np.setdiff1d(np.flatnonzero(counts == 0), list(tokenizer.special_ids))
    lengths = np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])
    longest = np.lexsort((np.arange(len(lengths)), -lengths))[:N_LONGEST]
    order = np.argsort(-counts, kind="stable")
    used = int((counts > 0).sum())
    powers = {10**power for power in range(len(str(used)))}
    ranks = sorted({round(value) for value in np.geomspace(1, max(1, used), _CURVE_POINTS)} | powers)

    def counted(indices: np.ndarray) -> list[tuple[Piece, int]]:
        return [(piece_of(tokenizer, int(index)), int(counts[index])) for index in indices]

    return {
        "unused": len(unused),
        "unused_examples": [piece_of(tokenizer, int(index)) for index in unused[:N_UNUSED]],
        "longest": counted(longest),
        "frequent": counted(order[: min(N_FREQUENT, used)]),
        "curve": [(rank, int(counts[order[rank - 1]])) for rank in ranks if rank <= used],
    }


def _samples(tokenizer: Tokenizer, documents: dict[tuple[str, str], Document]) -> list[Sampled]:
    """Beginnings of documents: languages take turns, so that all are seen, and of each the sources."""
    queues: dict[str, list[Document]] = {}
    for (language, _), document in documents.items():
        queues.setdefault(language, []).append(document)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
    chosen = itertools.islice((document for document in turns if document is not None), N_SAMPLES)
    return [
        Sampled(document.source, document.language, cut(tokenizer, document.text.strip()[:SAMPLE_CHARACTERS]))
        for document in chosen
    ]
