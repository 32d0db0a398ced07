"""What a tokenizer makes of a corpus: bytes per token by language and source, fertility, which tokens are used and
which never.

In: a tokenizer and documents. Out: plain values, which the terminal, the page and JSON all show. Fertility is tokens
per word, words being what white space separates (Rust et al. 2021, arXiv:2012.15613, section 4); it says little where
a language does not write spaces, bytes per token always does. GPT-2, cl100k and o200k are compared with if their files
lie whole in tiktoken's cache: nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groundup.batches import batches
from groundup.corpus.document import Document
from groundup.errors import DataError
from groundup.tokenizer.pieces import cut, piece_of
from groundup.tokenizer.split import replace_surrogates
from groundup.tokenizer.tokenizer import Tokenizer

MOST_BYTES = 64 << 20
"""How much text is enough to measure by."""

MOST_GROUPS = 30
"""So many languages or sources are listed; smaller ones are counted together."""

KNOWN = {
    "GPT-2": ("r50k_base", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    "cl100k": ("cl100k_base", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    "o200k": ("o200k_base", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}
"""tiktoken's names of well-known tokenizers, and the sha256 of their files; r50k_base has the same tokens as GPT-2."""

OTHERS = "(others)"
N_LONGEST = 40
N_UNUSED = 60
N_FREQUENT = 40
N_SAMPLES = 8
SAMPLE_CHARACTERS = 280
_GROUP_CHARACTERS = 4 << 20
_CURVE_POINTS = 120
_ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_COUNTS = ("documents", "bytes", "words", "tokens")


def measure(tokenizer: Tokenizer, documents: Iterable[Document], most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Look at documents until there is enough.

    Args:
        tokenizer: whose tokens.
        documents: a corpus; the documents of a run come in the order of their ids, so its beginning is a fair sample.
        most_bytes: of text; what comes behind is not read.

    Returns:
        `tokenizer` (kind, vocab_size, control_tokens, fingerprint); `total`, `languages` and `sources` (each name,
        documents, bytes, words, tokens, bytes_per_token, tokens_per_word, bytes_per_token_of the well-known
        tokenizers; the largest first, at most `MOST_GROUPS` and the others); `not_available_offline`; `unused` (how
        many tokens, control tokens aside) and `unused_examples`, `longest`, `frequent` (each id, shown and count);
        `frequency_curve` ([rank, occurrences] of the used tokens, from the most frequent on, at some ranks); `samples`
        (source, language, ids and pieces of beginnings of documents).

    Raises:
        DataError: there is no text.
    """
    counters = {name: counter(*known) for name, known in KNOWN.items()}
    at_hand = {name: count for name, count in counters.items() if count is not None}
    occurrences = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    total: Counter[str] = Counter()
    languages: dict[str, Counter[str]] = defaultdict(Counter)
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    samples: dict[tuple[str, str], Document] = {}
    for some in batches(_enough(documents, most_bytes), _GROUP_CHARACTERS, lambda one: len(one.text)):
        texts = [replace_surrogates(document.text) for document in some]
        ids, lengths = tokenizer.encode_to_arrays(texts)
        occurrences += np.bincount(ids, minlength=len(occurrences))
        known = {name: count(texts) for name, count in at_hand.items()}
        for place, (document, text) in enumerate(zip(some, texts, strict=True)):
            counts = {"documents": 1, "bytes": len(text.encode()), "words": len(text.split())}
            counts |= {"tokens": int(lengths[place]), **{name: found[place] for name, found in known.items()}}
            for group in (total, languages[document.language or "?"], sources[document.source]):
                group.update(counts)
            if len(samples) < 50 * N_SAMPLES:
                samples.setdefault((document.language, document.source), document)
    if not total["bytes"]:
        raise DataError("tokenizer report: there is no text to measure by.", "Name text files with --text.")
    return {
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "control_tokens": len(tokenizer.special_ids),
            "fingerprint": tokenizer.fingerprint,
        },
        "total": figures("all", total, at_hand),
        "languages": _largest(languages, at_hand),
        "sources": _largest(sources, at_hand),
        "not_available_offline": [name for name in counters if name not in at_hand],
        **_tokens(tokenizer, occurrences),
        "samples": _samples(tokenizer, samples),
    }


def counter(encoding: str, sha256: str) -> Callable[[Sequence[str]], list[int]] | None:
    """What counts the tokens of texts by one of tiktoken's encodings, or None where that would need the network."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    name = hashlib.sha1(_ADDRESS.format(encoding).encode()).hexdigest()
    file = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache") / name
    is_whole = file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    if folder == "" or not is_whole:  # "" is tiktoken's way of saying: no cache
        return None
    import tiktoken

    encode = tiktoken.get_encoding(encoding).encode_ordinary
    return lambda texts: [len(encode(text)) for text in texts]


def figures(name: str, counts: Mapping[str, int], known: Iterable[str] = ()) -> dict[str, Any]:
    """What is said of a language, of a source or of all text."""
    n_bytes, n_tokens = counts["bytes"], counts["tokens"]
    return {
        "name": name,
        **{what: counts[what] for what in _COUNTS},
        "bytes_per_token": n_bytes / max(1, n_tokens),
        "tokens_per_word": n_tokens / max(1, counts["words"]),
        "bytes_per_token_of": {other: n_bytes / max(1, counts[other]) for other in known},
    }


def _enough(documents: Iterable[Document], most_bytes: int) -> Iterator[Document]:
    seen = 0
    for document in documents:
        yield document
        seen += len(document.text.encode("utf-8", errors="replace"))
        if seen >= most_bytes:
            return


def _largest(groups: Mapping[str, Counter[str]], known: Iterable[str]) -> list[dict[str, Any]]:
    ordered = sorted(groups.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    rest = sum((counts for _, counts in ordered[MOST_GROUPS:]), Counter[str]())
    others = [(f"{OTHERS}: {len(ordered) - MOST_GROUPS}", rest)] if rest else []
    return [figures(name, counts, known) for name, counts in [*ordered[:MOST_GROUPS], *others]]


def _tokens(tokenizer: Tokenizer, occurrences: np.ndarray) -> dict[str, Any]:
    """What is known of the tokens by how often each occurs."""
    unused = np.setdiff1d(np.flatnonzero(occurrences == 0), list(tokenizer.special_ids))
    lengths = np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])
    longest = np.lexsort((np.arange(len(lengths)), -lengths))[:N_LONGEST]
    order = np.argsort(-occurrences, kind="stable")
    used = int((occurrences > 0).sum())
    powers = {10**power for power in range(len(str(used)))}
    ranks = sorted({round(value) for value in np.geomspace(1, max(1, used), _CURVE_POINTS)} | powers)

    def shown(ids: np.ndarray) -> list[dict[str, Any]]:
        return [{"id": i, "shown": piece_of(tokenizer, i).shown, "count": int(occurrences[i])} for i in ids.tolist()]

    return {
        "unused": len(unused),
        "unused_examples": shown(unused[:N_UNUSED]),
        "longest": shown(longest),
        "frequent": shown(order[: min(N_FREQUENT, used)]),
        "frequency_curve": [[rank, int(occurrences[order[rank - 1]])] for rank in ranks if rank <= used],
    }


def _samples(tokenizer: Tokenizer, documents: Mapping[tuple[str, str], Document]) -> list[dict[str, Any]]:
    """Beginnings of documents: languages take turns, so that all are seen, and of each the sources."""
    queues: dict[str, list[Document]] = defaultdict(list)
    for (language, _), document in documents.items():
        queues[language].append(document)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
    samples = []
    for document in itertools.islice((one for one in turns if one is not None), N_SAMPLES):
        pieces = cut(tokenizer, document.text.strip()[:SAMPLE_CHARACTERS])
        ids, shown = [piece.id for piece in pieces], [piece.shown for piece in pieces]
        samples.append({"source": document.source, "language": document.language, "ids": ids, "pieces": shown})
    return samples
