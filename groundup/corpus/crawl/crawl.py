"""`crawl`: addresses to WARC files.

Around a session (`session.py`): what was given is checked, the folder is locked and its files are read, and at the
end, however it comes, the growing file gets its name and `crawl.json` its counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from groundup.console import Console
from groundup.corpus.crawl.report import CrawlReport
from groundup.errors import ArtifactError, GroundupError, Interrupted, RunError
from groundup.files import own_folder, remove_partials, write_json
from groundup.recipe.crawl import CrawlSettings
from groundup.untrusted import read_object

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
    dry_run: bool = False,
) -> CrawlReport:
    """Fetch pages and store them as WARC files; called again, it goes on.

    Args:
        urls: pages to fetch, and to follow links from.
        out: the crawl's folder; new, or of a crawl that is to go on.
        settings: scope, limits, politeness.
        console: where progress is shown.
        sitemaps: addresses of sitemaps whose pages are fetched.
        retry_failed: ask again for what earlier sessions gave up for a passing reason.
        dry_run: fetch robots.txt and sitemaps only, and write nothing: the report's `planned` says what is to be done.

    Raises:
        GroundupError: an address is not http(s), nothing was given, the disk is full, or a package is missing.
        ArtifactError: a file of the crawl is missing or damaged.
        RunError: another process works in the folder, it holds a crawl of another scope, or it is not ours.
        Interrupted: Ctrl-C; everything fetched is stored.
    """
    settings, console, out = settings or CrawlSettings(), console or Console(quiet=True), Path(out)
    try:
        from groundup.corpus.crawl.session import Session
        from groundup.corpus.crawl.warc import WarcFiles
    except ModuleNotFoundError as error:
        raise GroundupError(
            f"Crawling needs the package {error.name}, which is not installed.", "pip install 'groundup[crawl]'"
        ) from error
    given, report = _given(urls, sitemaps), CrawlReport(out)
    if dry_run:
        _run(Session(settings, console, report, WarcFiles(out), write=False), given, retry_failed)
        return report
    own_folder(out)
    try:
        with FileLock(out / ".lock", timeout=0.5):
            remove_partials(out)
            _check_scope(out, settings, bool(given))
            files = WarcFiles(out, settings.user_agent)
            try:
                _run(Session(settings, console, report, files), given, retry_failed)
            finally:
                files.close()
                write_json(out / SUMMARY, {"settings": settings.model_dump(mode="json"), **report.to_json()})
    except Timeout as error:
        raise RunError(
            f"{out}: another process crawls into this folder.", "Wait for it, or choose another folder with --out."
        ) from error
    return report


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
    summary = read_object(path) if path.exists() else {}
    if summary and not (isinstance(summary.get("settings"), dict) and isinstance(summary.get("files", []), list)):
        raise ArtifactError(f"{path}: not a crawl's summary.", "Choose another folder with --out.")
    return summary


def _given(urls: Sequence[str], sitemaps: Sequence[str]) -> list[Entry]:
    from groundup.corpus.crawl.urls import normalize_url
    from groundup.corpus.crawl.warc import Entry

    entries, wrong = dict[tuple[str, bool], Entry](), list[str]()
    for written, is_sitemap in [*((url, False) for url in urls), *((url, True) for url in sitemaps)]:
        if (url := normalize_url(written)) is None:
            wrong.append(f"  {written[:200]!r}")
        else:
            entries[url, is_sitemap] = Entry("given", url, sitemap=is_sitemap)
    if wrong:
        raise GroundupError(
            "\n".join([f"{len(wrong):,} of the addresses given cannot be fetched, such as", *wrong[:10]]),
            "An address begins with http:// or https://, names a host and carries no password.",
        )
    return list(entries.values())


def _check_scope(out: Path, settings: CrawlSettings, something_given: bool) -> None:
    from groundup.corpus.crawl.warc import FIX

    before, now = _summary(out), settings.model_dump(mode="json")
    if not before:
        if not something_given and not any(out.glob("pages-*.warc.gz*")):
            raise GroundupError(
                f"{out}: no crawl to go on with, and no address was given.",
                "Give addresses, --urls FILE or --sitemap ADDRESS.",
            )
        write_json(out / SUMMARY, {"settings": now})
    elif other := [f"{name} = {before['settings'].get(name)}" for name in _BINDING
                   if before["settings"].get(name) != now[name]]:  # fmt: skip
        fix = "Go on with the same, or choose another folder with --out."
        raise RunError(f"{out}: holds a crawl with {', '.join(other)}.", fix)
    elif gone := [name for name in map(str, before.get("files", [])) if not (out / name).is_file()]:
        raise ArtifactError(f"{out / gone[0]}: is gone.", FIX)


def _run(session: Session, given: list[Entry], retry_failed: bool) -> None:
    """Run to the end in a thread with an event loop of its own: it works within a notebook's loop too."""
    logging.getLogger("scrapy").addHandler(logging.NullHandler())  # else Python shows warnings on standard error
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(asyncio.run, session.run(given, retry_failed=retry_failed)).result()
        except KeyboardInterrupt as error:
            session.stop()
            pool.shutdown()
            said = f"Stopped. {session.report.stored:,} pages are stored in {session.report.folder}."
            raise Interrupted(said) from error
