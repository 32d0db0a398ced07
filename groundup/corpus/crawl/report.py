"""Why an address is not stored (`Refusal`), and what a crawl did (`CrawlReport`): counts that add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

_EXAMPLES = 3


class Refusal(StrEnum):
    """Why an address was not stored."""

    BAD_URL = "not an http address"
    OTHER_HOST = "leads to another host"
    PRIVATE = "private address"
    ROBOTS = "robots.txt"
    ROBOTS_UNREACHABLE = "robots.txt unreachable"
    NOINDEX = "noindex"
    DUPLICATE = "already fetched"
    STATUS = "status"
    SERVER_ERROR = "server error"
    TYPE = "content type"
    TOO_LARGE = "too large"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    CUT_OFF = "cut off"
    ENCODING = "content encoding"
    BAD_RESPONSE = "not HTTP"
    REDIRECT_LOOP = "redirect loop"
    TOO_MANY_REDIRECTS = "too many redirects"
    ASKED_TO_WAIT = "asked to wait too long"
    BAD_SITEMAP = "unusable sitemap"

    @property
    def passes(self) -> bool:
        """Whether a later session may succeed: `--retry-failed` asks again."""
        return self in _PASSING


_PASSING = frozenset(
    {
        Refusal.ROBOTS_UNREACHABLE, Refusal.SERVER_ERROR, Refusal.TIMEOUT, Refusal.CONNECTION, Refusal.CUT_OFF,
        Refusal.ASKED_TO_WAIT,
    }
)  # fmt: skip


class Refused(Exception):
    """An address is given up, for now or for good.

    Args:
        reason: why, as a word that is counted.
        detail: why, in this case.
        again: whether it pays to ask again soon.
        wait_seconds: how long the server asks us to wait before that.
    """

    def __init__(
        self, reason: Refusal, detail: str = "", *, again: bool = False, wait_seconds: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail, self.again, self.wait_seconds = reason, detail, again, wait_seconds


@dataclass(frozen=True)
class Planned:
    """What a crawl would do with an address: fetch it (no reason), or not."""

    url: str
    reason: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


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

    def refuse(self, url: str, reason: str, detail: str) -> None:
        """Count an address that was given up."""
        self.refused[str(reason)] += 1
        examples = self.examples.setdefault(str(reason), [])
        if len(examples) < _EXAMPLES:
            examples.append((url, detail))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = {name: value for name, value in vars(self).items() if name != "examples"}
        return {
            **values,
            "folder": str(self.folder),
            "refused": dict(self.refused.most_common()),
            "files": [path.name for path in self.files],
            "seconds": round(self.seconds, 3),
        }
