"""What a crawl may do: its scope, its limits and its politeness."""

from __future__ import annotations

from pydantic import Field, field_validator

from groundup.environment import version_of
from groundup.recipe import Section, Texts

DEFAULT_TYPES = ("text/html", "application/xhtml+xml", "text/plain")


class CrawlSettings(Section):
    """The scope, the limits and the politeness of a crawl."""

    depth: int = Field(0, ge=0, le=100, description="links to follow from a given page; 0: only the given pages")
    same_path: bool = Field(False, description="follow only links into the folder of a given page")
    hosts: Texts = Field((), description="further hosts that links and sitemaps may lead to")
    max_pages: int = Field(10_000, ge=1, description="pages to store in all, earlier sessions included")
    max_megabytes: float = Field(1000.0, gt=0.0, description="megabytes (10^6 bytes) of page bodies to store in all")
    max_page_mib: float = Field(10.0, gt=0.0, le=1024.0, description="a page with a longer body, unpacked, is left out")
    types: Texts = Field(DEFAULT_TYPES, min_length=1, description="content types to store; text/* is understood")
    delay_seconds: float = Field(1.0, ge=0.0, le=3600.0, description="pause between two requests to one host")
    concurrency: int = Field(16, ge=1, le=256, description="hosts that are asked at the same time, one request each")
    timeout_seconds: float = Field(30.0, gt=0.0, le=3600.0, description="a page that takes longer is given up")
    retries: int = Field(3, ge=0, le=20, description="times a page is asked for again after a passing fault")
    backoff_seconds: float = Field(2.0, gt=0.0, le=600.0, description="pause before the first retry; it doubles")
    max_wait_seconds: float = Field(
        300.0, ge=0.0, description="a host that asks for a longer pause (Retry-After, Crawl-delay) is left alone"
    )
    user_agent: str = Field(
        f"groundup/{version_of('groundup')} (corpus crawler)",
        description="the User-Agent header; its first word is looked up in robots.txt",
    )
    allow_private: bool = Field(False, description="also fetch from private, loopback and link-local addresses")
    file_mib: float = Field(256.0, gt=0.0, le=65536.0, description="size after which a new WARC file is begun")

    @field_validator("user_agent")
    @classmethod
    def _is_a_header(cls, value: str) -> str:
        value = value.strip()
        if not value or not value[0].isalnum() or not (value.isascii() and value.isprintable()):
            raise ValueError("must begin with a name of letters or digits, in printable ASCII")
        return value

    @field_validator("types", "hosts")
    @classmethod
    def _lower(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(value.strip().lower() for value in values)

    @property
    def product(self) -> str:
        """The name that robots.txt may give rules for: the user agent's first word, without its version."""
        return self.user_agent.split()[0].split("/")[0]
