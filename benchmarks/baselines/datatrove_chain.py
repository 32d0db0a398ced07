"""The text chain in datatrove 0.10, in one process; runs in an environment of its own (`datatrove.txt`).

    read JSONL → language (en) → Gopher quality → Gopher repetition → MinHash 14 × 8 → tokens → .ds file

Two forms. `default`: every step as it comes (spaCy's words, language probability of at least 0.65, gzip between
steps). `patched`: the fastest that we could make of it without rewriting a step: words by `str.split` (datatrove takes
any `WordTokenizer`), the most probable language only (top-1, as groundup decides), plain files between steps,
`encode_batch_fast`. In both, datatrove's download of lid.176.bin is replaced by a local lid.176.ftz, the same file that
groundup asks; both ask it about the whole text, as datatrove does.

Writes JSON: CPU seconds by step and in all (imports left out), tokens, ids kept, and with --explain why the others
were dropped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import datatrove.utils.lid
import fasttext.FastText  # noqa: F401 - loaded before the clock starts, as all of groundup is
import numpy
import spacy
import tokenizers
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter, LanguageFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WordTokenizer

MINHASH = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
END_OF_TEXT = "<|endoftext|>"
KEPT: list[str] = []
DROPPED: dict[str, str] = {}


def main() -> None:
    """Run the chain once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder with one .jsonl file")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--language-model", required=True, help="lid.176.ftz")
    parser.add_argument("--form", choices=("default", "patched"), required=True)
    parser.add_argument("--explain", action="store_true", help="note why each document is dropped")
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    datatrove.utils.lid.cached_asset_path_or_download = lambda *_, **__: arguments.language_model
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    started = cpu_seconds()
    wall = time.perf_counter()
    stages = {}
    for name, (steps, n_tasks) in chain(arguments).items():
        before = cpu_seconds()
        LocalPipelineExecutor(steps, tasks=n_tasks, workers=1, logging_dir=str(arguments.out / "logs" / name)).run()
        stages[name] = cpu_seconds() - before
    n_tokens = sum(path.stat().st_size for path in (arguments.out / "tokens").glob("*.ds")) // 2
    result: dict[str, Any] = {
        "cpu_seconds": cpu_seconds() - started,
        "wall_seconds": time.perf_counter() - wall,
        "stages": stages,
        "tokens": n_tokens,
        "documents_kept": len(KEPT),
        "versions": {
            "datatrove": importlib.metadata.version("datatrove"),
            "spacy": spacy.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": numpy.__version__,
        },
    }
    if arguments.explain:
        result |= {"kept": KEPT, "dropped": DROPPED}
    arguments.result.write_text(json.dumps(result), encoding="utf-8")


def chain(arguments: argparse.Namespace) -> dict[str, tuple[list[Any], int]]:
    """The pipelines, one after the other, each with its number of tasks."""
    is_patched = arguments.form == "patched"
    words: Any = Whitespace() if is_patched else "en"
    language = TopLanguage() if is_patched else LanguageFilter(languages=["en"])
    tokenizer = FastTokenizer if is_patched else DocumentTokenizer
    compression = None if is_patched else "gzip"
    filters = [
        language,
        GopherQualityFilter(language=words),
        GopherRepetitionFilter(language=words),
    ]
    duplicates = MinhashDedupFilter(str(arguments.out / "clusters"))
    if arguments.explain:
        for step, name in zip(
            [*filters, duplicates], ("language", "quality", "repetition", "near-duplicate"), strict=True
        ):
            step.exclusion_writer = Recorder(name)
    filtered = str(arguments.out / "filtered")
    folder = {name: str(arguments.out / name) for name in ("signatures", "buckets", "clusters", "tokens")}
    return {
        "filter": ([JsonlReader(str(arguments.input)), *filters, JsonlWriter(filtered, compression=compression)], 1),
        "signatures": ([JsonlReader(filtered), MinhashDedupSignature(folder["signatures"], MINHASH, words)], 1),
        "buckets": ([MinhashDedupBuckets(folder["signatures"], folder["buckets"], config=MINHASH)], 14),
        "clusters": ([MinhashDedupCluster(folder["buckets"], folder["clusters"], config=MINHASH)], 1),
        "remove, encode": (
            [
                JsonlReader(filtered),
                duplicates,
                LambdaFilter(note),
                tokenizer(folder["tokens"], str(arguments.tokenizer), eos_token=END_OF_TEXT, seed=0),
            ],
            1,
        ),
    }


class Whitespace(WordTokenizer):
    """Words as `str.split` has them."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """Not asked for by any step here."""
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Not asked for by any step here."""
        raise NotImplementedError


class TopLanguage(LanguageFilter):
    """Keeps a text whose most probable language is English, whatever the probability."""

    def __init__(self) -> None:
        super().__init__(languages=None)
        self.model.k = 1

    def filter(self, doc: Document) -> bool:
        """Whether the text is English."""
        (language, _), _ = self.model.predict(doc)
        return bool(language == "en")


class FastTokenizer(DocumentTokenizer):
    """Encodes without the places of tokens in the text, which nobody reads."""

    @cached_property
    def tokenizer(self) -> Any:
        """As the tokenizer, for the few methods that the step calls."""
        return _Fast(DocumentTokenizer.tokenizer.func(self))


class _Fast:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.encode_batch = tokenizer.encode_batch_fast
        self.get_vocab_size = tokenizer.get_vocab_size


class Recorder:
    """Stands in for the writer of dropped documents, and notes why they were dropped."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    def write(self, document: Document, rank: int = 0) -> None:
        """Note it."""
        why = document.metadata.get("filter_reason")
        DROPPED[document.id] = f"{self.name}: {why}" if why else self.name


def note(document: Document) -> bool:
    """Remember who is kept."""
    KEPT.append(document.id)
    return True


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main()
