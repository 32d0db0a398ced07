"""`crawl`: addresses to WARC files.

Around a session (`session.py`): what was given is checked, the folder is locked and its journal taken up, and at the
end, however it comes, the files get their names and `crawl.json` its counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from groundup.console import Console
from groundup.corpus.crawl.fetch import Fetcher
from groundup.corpus.crawl.journal import JOURNAL, Entry, Store, read_journal
from groundup.corpus.crawl.report import CrawlReport
from groundup.corpus.crawl.session import Planned, Session
from groundup.corpus.crawl.settings import CrawlSettings
from groundup.corpus.crawl.urls import normalize_url
from groundup.corpus.crawl.warc import store_error
from groundup.errors import ArtifactError, GroundupError, Interrupted, RunError
from groundup.files import own_folder, read_json, remove_partials, write_json

SUMMARY = "crawl.json"
_BINDING = ("depth", "same_path")  # settings that decide what a finished page led to
_SAID_ANEW = {"allow_private", "user_agent"}


def crawl(
    urls: Sequence[str],
    out: str | Path,
    settings: CrawlSettings | None = None,
    console: Console | None = None,
    *,
    sitemaps: Sequence[str] = (),
    retry_failed: bool = False,
) -> CrawlReport:
    """Fetch pages and store them as WARC files; called again, it goes on.

    Args:
        urls: pages to fetch, and to follow links from.
        out: the crawl's folder; new, or of a crawl that is to go on.
        settings: scope, limits, politeness.
        console: where progress is shown.
        sitemaps: addresses of sitemaps whose pages are fetched.
        retry_failed: ask again for what earlier sessions gave up for a passing reason.

    Raises:
        GroundupError: an address is not http(s), nothing was given, the disk is full, or a package is missing.
        RunError: another process works in the folder, it holds a crawl of another scope, or it is not ours.
        Interrupted: Ctrl-C or SIGTERM; everything fetched is stored.
    """
    settings, console, out = settings or CrawlSettings(), console or Console(quiet=True), Path(out)
    given = _given(urls, sitemaps)
    fetcher = Fetcher(settings)
    with _locked(out):
        remove_partials(out)
        _check_scope(out, settings, bool(given))
        store = Store(out, settings)
        session = Session(settings, console, fetcher, CrawlReport(out), store, retry_failed=retry_failed)
        try:
            _run(session, given)
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            raise Interrupted(f"Stopped. {session.report.stored:,} pages are stored in {out}.") from error
        finally:
            store.close()
            write_json(out / SUMMARY, {"settings": settings.model_dump(mode="json"), **session.report.to_json()})
    return session.report


def plan_crawl(
    urls: Sequence[str],
    settings: CrawlSettings | None = None,
    *,
    sitemaps: Sequence[str] = (),
    out: str | Path | None = None,
    console: Console | None = None,
) -> list[Planned]:
    """What `crawl` would do with these addresses and sitemaps; only robots.txt and sitemaps are fetched.

    Args:
        urls: as for `crawl`.
        settings: as for `crawl`.
        sitemaps: as for `crawl`.
        out: a folder whose finished pages are left out of the plan; nothing is written to it.
        console: where progress is shown.
    """
    settings = settings or CrawlSettings()
    folder = Path(out) if out is not None else None
    before = [entry for entry, _ in read_journal(folder / JOURNAL)] if folder is not None else []
    report = CrawlReport(folder or Path())
    session = Session(settings, console or Console(quiet=True), Fetcher(settings), report, None, before=before)
    try:
        _run(session, _given(urls, sitemaps))
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        raise Interrupted("Stopped.") from error
    return session.planned


def earlier_settings(out: str | Path) -> dict[str, Any]:
    """The settings of the crawl in a folder, as `CrawlSettings` takes them; none for a new folder.

    Private addresses are not among them: they must be allowed each time.

    Raises:
        ArtifactError: `crawl.json` is damaged.
    """
    path = Path(out) / SUMMARY
    before = _summary(path)["settings"] if path.exists() else {}
    return {name: value for name, value in before.items() if name in CrawlSettings.model_fields.keys() - _SAID_ANEW}


def _summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("settings"), dict):
        raise ArtifactError(f"{path}: not a crawl's summary.", "Choose another folder with --out.")
    return summary


def _given(urls: Sequence[str], sitemaps: Sequence[str]) -> list[Entry]:
    given: dict[str, Entry] = {}
    wrong: list[str] = []
    for is_sitemap, group in ((False, urls), (True, sitemaps)):
        for written in group:
            url = normalize_url(written)
            if url is None:
                wrong.append(written)
            else:
                given.setdefault(url, Entry("given", url, sitemap=is_sitemap))
    if wrong:
        shown = "\n".join(f"  {url[:200]!r}" for url in wrong[:10])
        more = f"\n  and {len(wrong) - 10:,} more" if len(wrong) > 10 else ""
        raise GroundupError(
            f"{len(wrong):,} of the addresses given cannot be fetched:\n{shown}{more}",
            "An address begins with http:// or https://, names a host and carries no password.",
        )
    return list(given.values())


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    own_folder(out)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout as error:
        raise RunError(
            f"{out}: another process crawls into this folder.", "Wait for it, or choose another folder with --out."
        ) from error
    except OSError as error:
        raise store_error(out, error) from error
    try:
        yield
    finally:
        lock.release()


def _check_scope(out: Path, settings: CrawlSettings, something_given: bool) -> None:
    path = out / SUMMARY
    if not path.exists():
        if not something_given and not (out / JOURNAL).exists():
            raise GroundupError(
                f"{out}: no crawl to go on with, and no address was given.",
                "Give addresses, --urls FILE or --sitemap ADDRESS.",
            )
        write_json(path, {"settings": settings.model_dump(mode="json")})
        return
    before = _summary(path)["settings"]
    now = settings.model_dump(mode="json")
    if other := [name for name in _BINDING if before.get(name) != now[name]]:
        raise RunError(
            f"{out}: holds a crawl with " + ", ".join(f"{name} = {before.get(name)}" for name in other) + ".",
            "Go on with the same, or choose another folder with --out.",
        )


def _run(session: Session, given: list[Entry]) -> None:
    """Run to the end, also from within a running event loop (a notebook), then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(session.run(given))
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, session.run(given)).result()
