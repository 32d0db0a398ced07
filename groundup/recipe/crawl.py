"""What a crawl may do: its scope, its limits and its politeness. No section of a recipe, but made like one."""

from __future__ import annotations

from pydantic import field_validator

from groundup.environment import version_of
from groundup.recipe.sections import Section, Texts, setting


class CrawlSettings(Section):
    """The settings of a crawl; `groundup corpus crawl` has an option for each."""

    depth: int = setting(0, "links to follow from a given page, on the same host", ge=0, le=100)
    same_path: bool = setting(False, "follow only links into the folder of a given page")
    hosts: Texts = setting((), "further hosts that links and sitemaps may lead to")
    max_pages: int = setting(10_000, "pages to store in all, earlier sessions included", ge=1)
    max_megabytes: float = setting(1000.0, "megabytes (10^6 bytes) of pages to store in all", gt=0.0)
    max_page_mib: float = setting(10.0, "leave out pages that are longer, unpacked", gt=0.0, le=1024.0)
    types: Texts = setting(
        ("text/html", "application/xhtml+xml", "text/plain"),
        "content types to keep, such as text/*",
        min_length=1,
    )
    delay_seconds: float = setting(
        1.0, "seconds between two requests to a host, or more as robots.txt asks", ge=0.0, le=3600.0
    )
    concurrency: int = setting(16, "hosts that are asked at the same time, one request each", ge=1, le=256)
    timeout_seconds: float = setting(30.0, "seconds until a page is given up", gt=0.0, le=3600.0)
    retries: int = setting(3, "times to ask again after a passing fault", ge=0, le=20)
    max_wait_seconds: float = setting(
        300.0, "leave a host alone that asks for a longer pause (Retry-After, Crawl-delay)", ge=0.0
    )
    user_agent: str = setting(
        f"groundup/{version_of('groundup')} (corpus crawler)",
        "User-Agent header, ASCII; its first word is looked up in robots.txt; name an address where you can be reached",
        pattern=r"^[A-Za-z0-9][ -~]*$",
    )
    allow_private: bool = setting(False, "fetch from private and local addresses too")

    @field_validator("types", "hosts")
    @classmethod
    def _split(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(part for value in values for part in value.replace(" ", "").lower().split(",") if part)

    @property
    def product(self) -> str:
        """The name that robots.txt may give rules for: the user agent's first word, without its version."""
        return self.user_agent.split()[0].split("/")[0]
