"""robots.txt (RFC 9309): what a site allows us, and how fast.

2xx: its rules. 4xx: everything is allowed. 5xx, 429 or no answer: nothing is (section 2.3.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from groundup.corpus.crawl.settings import Refusal, Refused

if TYPE_CHECKING:
    from protego import Protego

MAX_ROBOTS_BYTES = 512 << 10
"""Of a longer robots.txt, the beginning counts (section 2.5 asks for 500 KiB at least)."""
MAX_AGE_SECONDS = 24 * 3600.0
"""When it is to be fetched anew (section 2.4)."""

_AGENT_LINE = re.compile(r"\s*user-?\s*agent\s*:\s*([^#]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Robots:
    """The rules of one origin for us.

    Attributes:
        product: our name.
        rules: the parsed file; None where there is none.
        refusal: why nothing may be fetched from this origin; None where something may.
        fetched: when, on the crawl's clock, in seconds.
    """

    product: str
    rules: Protego | None = None
    refusal: Refused | None = None
    fetched: float = 0.0

    @property
    def delay_seconds(self) -> float:
        """The pause that the site asks for, 0 if none."""
        return float(self.rules.crawl_delay(self.product) or 0.0) if self.rules is not None else 0.0

    def check(self, url: str) -> None:
        """Raise `Refused` if `url` may not be fetched."""
        if self.refusal is not None:
            raise Refused(self.refusal.reason, self.refusal.detail)  # a new one: each raise adds to a traceback
        if self.rules is not None and not self.rules.can_fetch(url, self.product):
            raise Refused(Refusal.ROBOTS, "")


def parse_robots(body: bytes, product: str, *, whole: bool = True) -> Protego:
    """Read a robots.txt.

    Args:
        body: its bytes, or the beginning of them.
        product: our name.
        whole: whether nothing was cut off; a line that was cut off does not count.
    """
    from protego import Protego

    if not whole:
        body = body[: max(body.rfind(b"\n"), body.rfind(b"\r")) + 1]
    return Protego.parse(_for_us(body.decode("utf-8-sig", "replace").replace("\0", ""), product.lower()))


def _for_us(text: str, product: str) -> str:
    """The text with every other robot under one name: ten thousand names before ten thousand rules cost nothing."""
    kept: list[str] = []
    for line in text.splitlines():
        if match := _AGENT_LINE.match(line):
            name = match[1].strip().lower()
            if name != "*" and name.replace("*", "") not in product:
                line = "User-agent: another-robot"
            if kept and kept[-1] == line:
                continue
        kept.append(line)
    return "\n".join(kept)
