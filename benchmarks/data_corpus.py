"""Made-up text of any size for the benchmarks of the data stage: the same seed and pool give the same bytes.

Documents are sentences of real texts put together anew, so that each is unique, as long as web pages are (log-normal,
mean about 5 kB), and reads like language to every filter. Among them are planted what the stage is there for: near
copies (up to 5 % of the words edited), exact copies, other languages, and noise (too short, repeated lines, symbols,
bullets). The pool is the text that ships with groundup, and any JSONL files with `text` and `lang` that are named.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import groundup

CLASSICS = Path(groundup.__file__).parent / "data" / "classics.jsonl"
KINDS = {"plain": 0.75, "near copy": 0.09, "copy": 0.01, "foreign": 0.08, "noise": 0.07}
"""Share of the documents of each kind."""
MEDIAN_CHARACTERS, SPREAD = 3000, 1.0
LEAST_CHARACTERS, MOST_CHARACTERS = 200, 100_000
MOST_EDITED = 0.05
REMEMBERED = 2000
POOL_BYTES = 64 << 20

FOREIGN = {
    "de": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
        "Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
        "Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.",
        "Niemand darf in Sklaverei oder Leibeigenschaft gehalten werden.",
    ),
    "fr": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
        "Ils sont doués de raison et de conscience.",
        "Ils doivent agir les uns envers les autres dans un esprit de fraternité.",
        "Tout individu a droit à la vie, à la liberté et à la sûreté de sa personne.",
        "Nul ne sera tenu en esclavage ni en servitude.",
    ),
    "ru": (
        "Все люди рождаются свободными и равными в своем достоинстве и правах.",
        "Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.",
        "Каждый человек имеет право на жизнь, на свободу и на личную неприкосновенность.",
    ),
    "zh": (
        "人人生而自由,在尊严和权利上一律平等。",
        "他们赋有理性和良心,并应以兄弟关系的精神相对待。",
        "人人有权享有生命、自由和人身安全。",
    ),
}
"""From the Universal Declaration of Human Rights; used where the pool has no other language."""


def write_corpus(path: Path, megabytes: float, seed: int = 0, pools: tuple[Path, ...] = ()) -> dict[str, int]:
    """Write a corpus as JSON lines: id, text, url, source (the kind of document).

    Args:
        path: the file.
        megabytes: of text, in millions of bytes of UTF-8.
        seed: of everything that is drawn.
        pools: JSONL files (.gz too) whose sentences are used beside the classics'.

    Returns:
        Documents of each kind.
    """
    counts = dict.fromkeys(KINDS, 0)
    size, number = 0, 0
    with path.open("w", encoding="utf-8") as handle:
        for kind, text in documents(random.Random(seed), *sentence_pools(pools)):
            record = {"id": f"{number:08d}", "text": text, "url": f"https://example.org/{number}", "source": kind}
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[kind] += 1
            number += 1
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return counts
    raise AssertionError("documents never end")


def documents(rng: random.Random, english: list[str], foreign: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Documents without end: kind and text."""
    before: list[str] = []
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        kind = rng.choices(kinds, weights)[0] if before else "plain"
        if kind == "plain":
            text = compose(rng, english)
            if len(before) < REMEMBERED:
                before.append(text)
            else:
                before[rng.randrange(REMEMBERED)] = text
        elif kind == "near copy":
            text = edited(rng, rng.choice(before), english)
        elif kind == "copy":
            text = rng.choice(before)
        elif kind == "foreign":
            text = compose(rng, rng.choice(foreign))
        else:
            text = noise(rng, english)
        yield kind, text


def compose(rng: random.Random, sentences: list[str]) -> str:
    """Sentences in paragraphs of three to six; none twice while the pool lasts."""
    wanted = min(max(rng.lognormvariate(0, SPREAD) * MEDIAN_CHARACTERS, LEAST_CHARACTERS), MOST_CHARACTERS)
    paragraphs, paragraph, size = [], [], 0
    used: set[int] = set()
    while size < wanted and len(used) < len(sentences):
        place = rng.randrange(len(sentences))
        if place in used:
            continue
        used.add(place)
        paragraph.append(sentences[place])
        size += len(sentences[place]) + 1
        if len(paragraph) >= rng.randint(3, 6):
            paragraphs.append(" ".join(paragraph))
            paragraph = []
    return "\n\n".join([*paragraphs, " ".join(paragraph)]).strip()


def edited(rng: random.Random, text: str, english: list[str]) -> str:
    """Up to 5 % of the words replaced by words from elsewhere."""
    words = text.split(" ")
    share = rng.random() * MOST_EDITED
    for place in range(len(words)):
        if rng.random() < share:
            words[place] = rng.choice(rng.choice(english).split(" "))
    return " ".join(words)


def noise(rng: random.Random, english: list[str]) -> str:
    """What the quality rules are there for."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(english)[:200]
    if kind == 1:
        lines = [rng.choice(english) for _ in range(4)]
        return "\n".join(lines * rng.randint(3, 20))
    if kind == 2:
        return " ".join("".join(rng.choices("#$%&/()=*+_-~|0123456789", k=rng.randint(1, 9))) for _ in range(300))
    return "\n".join(f"- {rng.choice(english)[:60]}" for _ in range(rng.randint(20, 80)))


def sentence_pools(paths: tuple[Path, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """English sentences, and those of every other language with enough of them, in a fixed order."""
    english: dict[str, None] = {}
    others: dict[str, dict[str, None]] = {}
    for path in (CLASSICS, *paths):
        for record in records_of(path):
            language = record.get("lang", "en")
            pool = english if language == "en" else others.setdefault(language, {})
            pool.update(dict.fromkeys(sentences_of(record["text"])))
    foreign = [list(pool) for _, pool in sorted(others.items()) if len(pool) >= 50]
    return list(english), foreign or [list(sentences) for sentences in FOREIGN.values()]


def sentences_of(text: str) -> list[str]:
    """Cut after sentence ends and at line breaks; scraps are left out."""
    parts = re.split(r"(?<=[.!?…。！？])\s+|\n+", text)
    return [part for part in map(str.strip, parts) if 20 <= len(part.encode()) <= 1000]


def records_of(path: Path) -> Iterator[dict[str, str]]:
    """The records of a JSONL file, up to 64 MiB of them."""
    size = 0
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
            size += len(line)
            if size > POOL_BYTES:
                return
