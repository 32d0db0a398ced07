"""Addresses to WARC files, which `[corpus] inputs` reads: the only part of the data stage that uses the network."""

from groundup.errors import GroundupError

try:
    from groundup.corpus.crawl.crawl import CrawlReport, crawl
except ModuleNotFoundError as error:
    what = f"Crawling needs the package {error.name}, which is not installed."
    raise GroundupError(what, "pip install 'groundup[crawl]'") from error
from groundup.recipe.crawl import CrawlSettings

__all__ = ["CrawlReport", "CrawlSettings", "crawl"]
