"""`crawl`: addresses to WARC files.

Around a session (`spider.py`): what was given is checked, the folder is locked and its files are read, and at the end,
however it comes, the growing file gets its name and `crawl.json` its counts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from groundup.console import Console
from groundup.errors import GroundupError, Interrupted, RunError
from groundup.files import own_folder, remove_partials, write_json
from groundup.recipe.crawl import CrawlSettings


@dataclass
class CrawlReport:
    """The state of a crawl's folder, all sessions together: found = stored + listed + refused + waiting."""

    folder: Path
    stored: int = 0  # pages in the WARC files
    stored_bytes: int = 0  # of their bodies
    listed: int = 0  # sitemaps that were read
    refused: Counter[str] = field(default_factory=Counter)  # addresses given up, by reason
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)  # the first of each reason, and its detail
    found: int = 0  # addresses given or found
    fetched: int = 0  # pages stored in this session
    closed_hosts: dict[str, str] = field(default_factory=dict)  # left alone until the next session, and why
    limit: str = ""  # the setting that ended this session

    @property
    def waiting(self) -> int:
        """Addresses without an outcome."""
        return self.found - self.stored - self.listed - self.refused.total()

    @property
    def files(self) -> list[Path]:
        """The finished WARC files."""
        return sorted(self.folder.glob("pages-*.warc.gz"))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        names = [path.name for path in self.files]
        return {**vars(self), "waiting": self.waiting, "folder": str(self.folder), "files": names}


def crawl(
    urls: Sequence[str],
    out: str | Path,
    settings: CrawlSettings | None = None,
    console: Console | None = None,
    *,
    sitemaps: Sequence[str] = (),
) -> CrawlReport:
    """Fetch pages and store them as WARC files; called again, it goes on: what is stored is not fetched again.

    Args:
        urls: pages to fetch, and to follow links from.
        out: the crawl's folder; new, or of a crawl that is to go on.
        settings: scope, limits, politeness.
        console: where progress is shown.
        sitemaps: addresses of sitemaps whose pages are fetched.

    Raises:
        GroundupError: an address is not http(s), nothing was given, the disk is full, or a package is missing.
        RunError: another process works in the folder, or it is not ours.
        Interrupted: Ctrl-C; everything fetched is stored.
    """
    settings, console, out = settings or CrawlSettings(), console or Console(quiet=True), Path(out)
    try:
        from groundup.corpus.crawl.pages import normalize_url
        from groundup.corpus.crawl.spider import Page, run
        from groundup.corpus.crawl.warc import WarcFiles
    except ModuleNotFoundError as error:
        raise GroundupError(
            f"Crawling needs the package {error.name}, which is not installed.", "pip install 'groundup[crawl]'"
        ) from error
    given = [(url, normalize_url(url), url in sitemaps) for url in (*urls, *sitemaps)]
    if not given or (wrong := [written for written, url, _ in given if url is None]):
        raise GroundupError(
            f"{len(wrong):,} of the addresses given cannot be fetched, such as {', '.join(map(repr, wrong[:10]))}."
            if given else "No address was given.",
            "An address begins with http:// or https://, names a host and carries no password.",
        )  # fmt: skip
    own_folder(out)
    report, stopping = CrawlReport(out), threading.Event()
    try:
        with FileLock(out / ".lock", timeout=0.5):
            remove_partials(out)
            files = WarcFiles(out, settings.user_agent)
            pages = [Page(url, sitemap=sitemap, named=True) for _, url, sitemap in given if url]
            logging.getLogger("scrapy").addHandler(logging.NullHandler())  # else Python shows its warnings
            try:
                with ThreadPoolExecutor(1) as pool:  # an event loop of its own: it works within a notebook's too
                    job = run(settings, console=console, report=report, files=files, given=pages, stopping=stopping)
                    try:
                        pool.submit(asyncio.run, job).result()
                    finally:
                        stopping.set()
            except KeyboardInterrupt as error:
                raise Interrupted(f"Stopped. {report.stored:,} pages are stored in {out}.") from error
            finally:
                files.close()
                write_json(out / "crawl.json", {"settings": settings.model_dump(mode="json"), **report.to_json()})
    except Timeout as error:
        raise RunError(
            f"{out}: another process crawls into this folder.", "Wait for it, or choose another folder with --out."
        ) from error
    return report
