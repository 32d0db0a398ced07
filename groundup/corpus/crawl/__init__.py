"""From addresses to WARC files: the only part of the data stage that goes to the network, and only where it is told to.

In: addresses, lists of them, sitemaps. Out: a folder of `.warc.gz` files, from which a killed crawl goes on, and
`crawl.json`. `[corpus] inputs` reads such a folder like any other.
"""

from groundup.corpus.crawl.crawl import CrawlReport, crawl
from groundup.recipe.crawl import CrawlSettings

__all__ = ["CrawlReport", "CrawlSettings", "crawl"]
