"""Texts to one array of ids with the documents' ends, and the tally of what came from where.

No Python object is made per token: ids stay in numpy from the tokenizer to the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.corpus.document import Document
from groundup.errors import ArtifactError
from groundup.shards.format import Counts, ShardFile, Split

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

GROUP_CHARACTERS = 4 << 20
MOST_NAMES = 1000
"""So many sources or languages are listed in a manifest; the smaller ones are counted together."""
OTHERS = "(others)"


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of texts one after the other, each followed by `<|endoftext|>`.

    Returns:
        ids, (n_tokens,) of `dtype`, and where each text's last id ends, (n_texts,) int64.

    Raises:
        ArtifactError: the tokenizer gives an id that its vocabulary does not have.
    """
    ids, lengths = tokenizer.encode_to_arrays(texts)
    largest = int(ids.max(initial=0))
    if largest >= tokenizer.vocab_size:
        raise ArtifactError(
            f"the tokenizer gives id {largest}, but says that its vocabulary has {tokenizer.vocab_size} entries.",
            "Train it again with --from tokenizer.",
        )
    ends = np.cumsum(lengths + 1)
    out = np.empty(len(ids) + len(lengths), dtype=dtype)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends - 1] = False
    out[is_text] = ids
    out[ends - 1] = tokenizer.end_of_text_id
    return out, ends


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype[Any], tallies: Mapping[str, Tally]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Documents in groups of a few MiB, so that the tokenizer can use every core in bounded memory.

    Yields:
        split, ids and ends, as `encode_texts` gives them; they are counted in the split's tally.
    """
    group: list[Document] = []
    size = 0
    for document in itertools.chain(documents, [None]):
        if document is not None:
            group.append(document)
            size += len(document.text)
        if size >= GROUP_CHARACTERS or document is None:
            for name in dict.fromkeys(one.split for one in group):
                part = [one for one in group if one.split == name]
                tokens, ends = encode_texts(tokenizer, [one.text for one in part], dtype)
                tallies[name].add(part, ends)
                yield name, tokens, ends
            group, size = [], 0


@dataclass
class Tally:
    """What is in a split.

    Attributes:
        documents: how many.
        tokens: ids, `<|endoftext|>` included.
        text_bytes: UTF-8 bytes of the text.
        sources: all three by source.
        languages: by language ("unknown" where none is given).
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    languages: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, documents: Sequence[Document], ends: np.ndarray) -> None:
        """Count documents.

        Args:
            documents: the documents.
            ends: where each one's last id ends, (n_documents,).
        """
        lengths = np.diff(ends, prepend=0).tolist()
        for document, n_tokens in zip(documents, lengths, strict=True):
            text = document.text
            n_bytes = len(text) if text.isascii() else len(text.encode())
            self.text_bytes += n_bytes
            _count(self.sources, document.source, 1, n_bytes, n_tokens)
            _count(self.languages, document.language or "unknown", 1, n_bytes, n_tokens)
        self.documents += len(documents)
        self.tokens += sum(lengths)

    def merge(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        for mine, theirs in ((self.sources, other.sources), (self.languages, other.languages)):
            for name, counts in theirs.items():
                _count(mine, name, counts["documents"], counts["bytes"], counts["tokens"])

    def split(self, files: tuple[ShardFile, ...]) -> Split:
        """What the manifest says of it."""
        by_size = largest_first(self.sources), largest_first(self.languages)
        return Split(self.tokens, self.documents, self.text_bytes, files, *by_size)


def largest_first(counts: Counts, most: int = MOST_NAMES) -> dict[str, dict[str, int]]:
    """Counts in order of their tokens (equal ones by name), the smallest of too many joined under one name."""
    order = sorted(counts, key=lambda name: (-counts[name]["tokens"], name))
    out = {name: dict(counts[name]) for name in order[:most]}
    for name in order[most:]:
        _count(out, OTHERS, counts[name]["documents"], counts[name]["bytes"], counts[name]["tokens"])
    return out


def _count(counts: dict[str, dict[str, int]], name: str, n_documents: int, n_bytes: int, n_tokens: int) -> None:
    entry = counts.setdefault(name, {"documents": 0, "bytes": 0, "tokens": 0})
    entry["documents"] += n_documents
    entry["bytes"] += n_bytes
    entry["tokens"] += n_tokens
