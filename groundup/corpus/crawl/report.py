"""Why an address is not stored (`Refusal`), and what a crawl did (`CrawlReport`): counts that add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple


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
        return self.name in ("ROBOTS_UNREACHABLE", "SERVER_ERROR", "TIMEOUT", "CONNECTION", "CUT_OFF")


class Refused(Exception):
    """An address is given up, for now or for good (`again`: it pays to ask again soon, after `wait_seconds`)."""

    def __init__(
        self, reason: Refusal, detail: str = "", *, again: bool = False, wait_seconds: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail, self.again, self.wait_seconds = reason, detail, again, wait_seconds


class Planned(NamedTuple):
    """What a crawl would do with an address: fetch it (no reason), or not."""

    url: str
    reason: str = ""
    detail: str = ""


@dataclass
class CrawlReport:
    """The state of a crawl's folder, all sessions together: found = stored + listed + refused + waiting."""

    folder: Path
    stored: int = 0  # pages in the WARC files
    stored_bytes: int = 0  # of their bodies
    listed: int = 0  # sitemaps that were read
    refused: Counter[str] = field(default_factory=Counter)  # addresses given up, by reason
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)  # the first of each reason, and its detail
    waiting: int = 0  # addresses without an outcome
    found: int = 0  # addresses given or found
    fetched: int = 0  # pages stored in this session
    elsewhere: int = 0  # addresses in sitemaps that lead to hosts outside the crawl; not among the found
    overflow: int = 0  # addresses not followed because too many waited; not among the found
    closed_hosts: dict[str, str] = field(default_factory=dict)  # left alone until the next session, and why
    limit: str = ""  # the setting that ended this session
    planned: list[Planned] = field(default_factory=list)  # what a dry run found

    @property
    def files(self) -> list[Path]:
        """The finished WARC files."""
        return sorted(self.folder.glob("pages-*.warc.gz"))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = {name: value for name, value in vars(self).items() if name not in ("examples", "planned")}
        return {**values, "folder": str(self.folder), "files": [path.name for path in self.files]}
