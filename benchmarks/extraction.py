"""HTML to text: pages per CPU-second and accuracy of both extractors, as `groundup.corpus.reading.extract` runs them.

Processor time is that of this process and of the extractor's, its start included, over as many pages as one process
lives for; beside it the library by itself, called in this process. Accuracy: the article extraction benchmark's own
score (4-word shingles, every page of equal weight), and on Mozilla's readability pages the F1 of words against the text
of the expected page.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

from record import spread, write_result

from groundup.corpus.reading import extract_child
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.refusal import RefusedError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "html"
KINDS = ("trafilatura", "resiliparse")
TIMED_PAGES = 1000


def main() -> None:
    """Measure both extractors, in turn, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    articles, gold = read_articles()
    timed = [articles[at % len(articles)] for at in range(TIMED_PAGES)]
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    walls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    alone: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            cpu_seconds, wall_seconds = seconds_for(kind, timed)
            speeds[kind].append(TIMED_PAGES / cpu_seconds)
            alone[kind].append(TIMED_PAGES / seconds_alone(kind, timed))
            walls[kind].append(TIMED_PAGES / wall_seconds)
    mozilla, expected = read_mozilla()
    rows = []
    for kind in KINDS:
        accuracy = shingle_scores(gold, extracted(kind, articles))
        tokens = token_scores(expected, extracted(kind, mozilla))
        rows.append(
            {
                "extractor": kind,
                "pages_per_cpu_second": spread(speeds[kind]),
                "library_alone_pages_per_cpu_second": spread(alone[kind]),
                "pages_per_second": spread(walls[kind]),
                "article_extraction_benchmark": {"n_pages": len(articles), **accuracy},
                "mozilla_readability_words": {"n_pages": len(mozilla), **tokens},
            }
        )
        print(
            f"| {kind} | {rows[-1]['pages_per_cpu_second']['median']:.0f} pages/cpu-s | "
            f"library alone {rows[-1]['library_alone_pages_per_cpu_second']['median']:.0f} | "
            f"F1 {accuracy['f1']:.4f} | Mozilla words F1 {tokens['f1']:.4f} |"
        )
    mean_kib = sum(map(len, articles)) / len(articles) / 1024
    write_result("extraction", {"timed_pages": TIMED_PAGES, "mean_page_kib": mean_kib, "rows": rows})


def read_articles() -> tuple[list[bytes], list[str]]:
    """The pages of the article extraction benchmark and their articles."""
    folder = DATA / "article_extraction_benchmark"
    articles = json.loads((folder / "ground-truth.json").read_text())
    pages = [gzip.decompress((folder / "html" / f"{name}.html.gz").read_bytes()) for name in articles]
    return pages, [article["articleBody"] for article in articles.values()]


def read_mozilla() -> tuple[list[bytes], list[str]]:
    """The pages of Mozilla's readability tests and the text of the expected ones."""
    folders = sorted(path.parent for path in (DATA / "mozilla_readability").glob("*/source.html"))
    markup = [(folder / "expected.html").read_text(encoding="utf-8") for folder in folders]
    texts = [html.unescape(re.sub(r"<[^>]*>", " ", page)) for page in markup]
    return [(folder / "source.html").read_bytes() for folder in folders], texts


def seconds_for(kind: str, pages: list[bytes]) -> tuple[float, float]:
    """Processor and wall seconds for these pages, all processes together."""
    begin, before = time.perf_counter(), sum(os.times()[:4])
    extracted(kind, pages)
    return sum(os.times()[:4]) - before, time.perf_counter() - begin


def seconds_alone(kind: str, pages: list[bytes]) -> float:
    """Processor seconds of the library itself, in this process, with pages that are characters already."""
    extract = extract_child.load(kind)
    texts = list(map(extract_child.decode_html, pages))
    before = time.process_time()
    for text in texts:
        extract(text, "")
    return time.process_time() - before


def extracted(kind: str, pages: list[bytes]) -> list[str]:
    """The texts, "" where there is none."""
    texts = []
    with Extractor(kind, 60.0) as extractor:  # type: ignore[arg-type]
        for page in pages:
            try:
                texts.append(extractor.extract(page))
            except RefusedError:
                texts.append("")
    return texts


def shingle_scores(gold: list[str], found: list[str]) -> dict[str, float]:
    """The article extraction benchmark's precision, recall and F1."""
    hits = extra = missing = 0.0
    for expected, got in zip(map(shingles, gold), map(shingles, found), strict=True):
        total = sum((expected | got).values())
        hits += sum((expected & got).values()) / total
        extra += sum((got - expected).values()) / total
        missing += sum((expected - got).values()) / total
    return scores(hits, extra, missing)


def token_scores(gold: list[str], found: list[str]) -> dict[str, float]:
    """Mean over the pages of the words' precision, recall and F1 (as multisets)."""
    every = []
    for expected, got in zip(map(words, gold), map(words, found), strict=True):
        expected_words, got_words = Counter(expected), Counter(got)
        hits = sum((expected_words & got_words).values())
        every.append(scores(hits, len(got) - hits, len(expected) - hits))
    return {name: sum(page[name] for page in every) / len(every) for name in every[0]}


def scores(hits: float, extra: float, missing: float) -> dict[str, float]:
    """Precision, recall and F1; nothing found where nothing is expected is right."""
    precision = hits / (hits + extra) if hits + extra else float(not missing)
    recall = hits / (hits + missing) if hits + missing else float(not extra)
    f1 = 2 * hits / (2 * hits + extra + missing) if hits + extra + missing else 1.0
    return {"precision": precision, "recall": recall, "f1": f1}


def words(text: str) -> list[str]:
    """A text's words."""
    return re.findall(r"\w+", text)


def shingles(text: str, size: int = 4) -> Counter[tuple[str, ...]]:
    """A text's runs of four words (a shorter text is one run)."""
    every = words(text)
    return Counter(tuple(every[at : at + size]) for at in range(max(1, len(every) - size + 1)))


if __name__ == "__main__":
    main()
