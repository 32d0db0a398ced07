"""`crawl`: addresses to WARC files.

Around a session (`session.py`): what was given is checked, the folder is locked and its files are read, and at the
end, however it comes, the growing file gets its name and `crawl.json` its counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from groundup.console import Console
from groundup.corpus.crawl.report import CrawlReport, Planned
from groundup.corpus.crawl.settings import CrawlSettings
from groundup.errors import ArtifactError, GroundupError, Interrupted, RunError
from groundup.files import own_folder, read_json, remove_partials, write_error, write_json

if TYPE_CHECKING:
    from groundup.corpus.crawl.session import Session
    from groundup.corpus.crawl.warc import Entry

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
        ArtifactError: a file of the crawl is missing or damaged.
        RunError: another process works in the folder, it holds a crawl of another scope, or it is not ours.
        Interrupted: Ctrl-C or SIGTERM; everything fetched is stored.
    """
    settings, console, out = settings or CrawlSettings(), console or Console(quiet=True), Path(out)
    given = _given(urls, sitemaps)
    from groundup.corpus.crawl.session import Session
    from groundup.corpus.crawl.warc import WarcFiles

    with _locked(out):
        remove_partials(out)
        _check_scope(out, settings, bool(given))
        files = WarcFiles(out, settings.user_agent, int(settings.file_mib * 2**20))
        session = Session(settings, console, CrawlReport(out), files.entries, files, retry_failed=retry_failed)
        try:
            _run(session, given)
        except KeyboardInterrupt as error:
            raise Interrupted(f"Stopped. {session.report.stored:,} pages are stored in {out}.") from error
        finally:
            files.close()
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
    settings, console, folder = settings or CrawlSettings(), console or Console(quiet=True), Path(out or "")
    given = _given(urls, sitemaps)
    from groundup.corpus.crawl.session import Session
    from groundup.corpus.crawl.warc import WarcFiles

    before = WarcFiles(folder, settings.user_agent, 0, write=False).entries if out is not None else []
    session = Session(settings, console, CrawlReport(folder), before, None)
    try:
        _run(session, given)
    except KeyboardInterrupt as error:
        raise Interrupted("Stopped.") from error
    return session.planned


def earlier_settings(out: str | Path) -> dict[str, Any]:
    """The settings of the crawl in a folder, as `CrawlSettings` takes them; none for a new folder.

    Private addresses are not among them: they must be allowed each time.

    Raises:
        ArtifactError: `crawl.json` is damaged.
    """
    before = _summary(Path(out)).get("settings", {})
    return {name: value for name, value in before.items() if name in CrawlSettings.model_fields.keys() - _SAID_ANEW}


def _summary(out: Path) -> dict[str, Any]:
    path = out / SUMMARY
    if not path.exists():
        return {}
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("settings"), dict):
        raise ArtifactError(f"{path}: not a crawl's summary.", "Choose another folder with --out.")
    return summary


def _given(urls: Sequence[str], sitemaps: Sequence[str]) -> list[Entry]:
    for package in ("aiohttp", "scrapy"):
        if importlib.util.find_spec(package) is None:
            raise GroundupError(
                f"Crawling needs the package {package}, which is not installed.", "pip install 'groundup[crawl]'"
            )
    if "twisted.internet.reactor" in sys.modules:
        raise GroundupError("This process runs a Twisted reactor, and the crawler needs one without.", "Use another.")
    from groundup.corpus.crawl.urls import normalize_url
    from groundup.corpus.crawl.warc import Entry

    given: dict[str, Entry] = {}
    wrong: list[str] = []
    for is_sitemap, group in ((False, urls), (True, sitemaps)):
        for written in group:
            if (url := normalize_url(written)) is None:
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
        raise write_error(out, error) from error
    try:
        yield
    finally:
        lock.release()


def _check_scope(out: Path, settings: CrawlSettings, something_given: bool) -> None:
    before = _summary(out)
    if not before:
        if not something_given and not any(out.glob("pages-*.warc.gz*")):
            raise GroundupError(
                f"{out}: no crawl to go on with, and no address was given.",
                "Give addresses, --urls FILE or --sitemap ADDRESS.",
            )
        write_json(out / SUMMARY, {"settings": settings.model_dump(mode="json")})
        return
    now = settings.model_dump(mode="json")
    if other := [name for name in _BINDING if before["settings"].get(name) != now[name]]:
        raise RunError(
            f"{out}: holds a crawl with "
            + ", ".join(f"{name} = {before['settings'].get(name)}" for name in other)
            + ".",
            "Go on with the same, or choose another folder with --out.",
        )
    if gone := [name for name in before.get("files", []) if not (out / name).is_file()]:
        raise ArtifactError(
            f"{out / gone[0]}: is gone.", "Put it back as it was, or begin a new crawl in another folder with --out."
        )


def _run(session: Session, given: list[Entry]) -> None:
    """Run to the end in a thread with an event loop of its own, so that it runs anywhere, a notebook's loop included.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; the session has stopped.
    """
    logging.getLogger("scrapy").addHandler(logging.NullHandler())  # else Python shows Scrapy's warnings on stderr
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(asyncio.run, session.run(given))
            try:
                work.result()
            except KeyboardInterrupt:
                session.stop()
                work.result()
                raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
