"""What a crawl did: counts that add up, for people and programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.corpus.crawl.journal import Entry
from groundup.corpus.crawl.settings import Refusal

_EXAMPLES = 3


@dataclass
class CrawlReport:
    """The state of a crawl's folder, all sessions together: found = stored + listed + refused + waiting.

    Attributes:
        folder: where it is.
        stored: pages in the WARC files.
        stored_bytes: bytes of their bodies.
        listed: sitemaps that were read.
        refused: addresses given up, by reason.
        examples: a few of them by reason: (address, detail).
        waiting: addresses without an outcome.
        found: addresses given or found.
        fetched: pages stored in this session.
        elsewhere: addresses in sitemaps that lead to hosts outside the crawl; not among the found.
        overflow: addresses not followed because too many waited; not among the found.
        closed_hosts: hosts that are left alone until the next session, and why.
        limit: the setting that ended this session, or "".
        seconds: how long this session took.
    """

    folder: Path
    stored: int = 0
    stored_bytes: int = 0
    listed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    waiting: int = 0
    found: int = 0
    fetched: int = 0
    elsewhere: int = 0
    overflow: int = 0
    closed_hosts: dict[str, str] = field(default_factory=dict)
    limit: str = ""
    seconds: float = 0.0

    @property
    def files(self) -> list[Path]:
        """The finished WARC files."""
        return sorted(self.folder.glob("pages-*.warc.gz"))

    def count(self, entry: Entry) -> None:
        """Count an outcome."""
        if entry.event == "stored":
            self.stored += 1
            self.stored_bytes += entry.size_bytes
        elif entry.event == "listed":
            self.listed += 1
        elif entry.event == "refused":
            reason = str(entry.reason)
            self.refused[reason] += 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < _EXAMPLES:
                examples.append((entry.url, entry.detail))

    def discount(self, url: str, reason: Refusal) -> None:
        """Take back a refusal of an address that is asked for again."""
        self.refused[str(reason)] -= 1
        self.refused += Counter()  # drops zeros
        self.examples[str(reason)] = [example for example in self.examples[str(reason)] if example[0] != url]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "folder": str(self.folder),
            "found": self.found,
            "stored": self.stored,
            "stored_bytes": self.stored_bytes,
            "listed": self.listed,
            "refused": dict(self.refused.most_common()),
            "waiting": self.waiting,
            "fetched": self.fetched,
            "elsewhere": self.elsewhere,
            "overflow": self.overflow,
            "closed_hosts": self.closed_hosts,
            "limit": self.limit,
            "files": [path.name for path in self.files],
            "seconds": round(self.seconds, 3),
        }
