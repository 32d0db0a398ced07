"""What the tests of the crawler share: quick settings, and what a crawl left, read by another reader."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scrapy")

from groundup.cli.building import stopping
from groundup.corpus.crawl import CrawlReport, CrawlSettings, crawl, fetch, warc
from groundup.errors import Interrupted

fetch.BACKOFF_SECONDS = 0.02

QUICK: dict[str, Any] = {
    "allow_private": True,
    "delay_seconds": 0.0,
    "timeout_seconds": 10.0,
    "retries": 1,
    "max_page_mib": 1.0,
}


def quick(**changes: Any) -> CrawlSettings:
    return CrawlSettings(**{**QUICK, **changes})


def crawl_and_exit(url: str, out: str, delay: float) -> None:
    """For a process of its own."""
    warc.FILE_BYTES = 20_000
    try:
        with stopping("Nothing."):
            crawl([url], out, CrawlSettings(allow_private=True, delay_seconds=delay, depth=3))
    except Interrupted as stop:
        sys.exit(stop.exit_code)


def records_of(folder: Path) -> list[tuple[str, str, dict[str, str], bytes]]:
    """(kind, address, HTTP headers, body) of every record, read by FastWARC, digests checked by it."""
    warc = pytest.importorskip("fastwarc.warc")
    found = []
    assert not list(folder.glob("*.open"))
    for path in sorted(folder.glob("*.warc.gz")):
        gzip.decompress(path.read_bytes())
        with path.open("rb") as handle:
            for record in warc.ArchiveIterator(handle, parse_http=False):
                record.freeze()
                assert record.verify_block_digest()
                kind = record.headers["WARC-Type"]
                headers: dict[str, str] = {}
                if kind in ("response", "request"):
                    record.parse_http()
                    headers = {name.lower(): value for name, value in record.http_headers.astuples()}
                found.append((kind, record.headers.get("WARC-Target-URI") or "", headers, record.reader.read()))
    return found


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("pages-*.warc.gz"))


def pages_of(folder: Path) -> dict[str, bytes]:
    """Stored bodies by address, each of which is there once."""
    responses = [(url, body) for kind, url, _, body in records_of(folder) if kind == "response"]
    assert len(responses) == len(dict(responses))
    return dict(responses)


def refused(report: CrawlReport) -> dict[str, int]:
    return {reason: count for reason, count in report.outcomes.items() if count and reason not in ("stored", "sitemap")}


def check_law(report: CrawlReport) -> None:
    """Every address that was given or found has an outcome, unless its host is left alone."""
    assert report.waiting >= 0
    assert not report.waiting or report.closed_hosts


def only_reason(report: CrawlReport) -> str:
    check_law(report)
    assert report.stored == 0
    (reason,) = refused(report)
    return reason


XMLNS = 'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'


def urlset(*urls: str) -> bytes:
    entries = "".join(f"<url><loc> {url} </loc><lastmod>2026-01-01</lastmod></url>" for url in urls)
    return f'<?xml version="1.0" encoding="UTF-8"?><urlset {XMLNS}>{entries}</urlset>'.encode()


def index(*urls: str) -> bytes:
    return (
        f"<sitemapindex {XMLNS}>{''.join(f'<sitemap><loc>{u}</loc></sitemap>' for u in urls)}</sitemapindex>".encode()
    )
