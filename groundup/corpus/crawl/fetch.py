"""One HTTP request, with a limit on everything a server can make endless: time, headers, body, what it unpacks to.

In: a normalized address. Out: a `Response` whose body is unpacked and whole, or a `Refused` that says why not.
Redirects come back as responses: each hop is a page of its own to the crawl's rules.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from groundup.corpus.crawl.addresses import PrivateAddress, socket_factory
from groundup.corpus.crawl.settings import CrawlSettings, Refusal, Refused
from groundup.errors import GroundupError

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.connector import Connection

REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING_STATUSES = frozenset({408, 425, 429})
_STEP_BYTES = 256 << 10
_CONNECT_SECONDS = 15.0


@dataclass(frozen=True)
class Response:
    """What a server answered.

    Attributes:
        url: what was asked for, normalized.
        status: the HTTP status.
        headers: names in lower case; of a repeated one, the values joined by ", ".
        status_line: as it was sent.
        raw_headers: as they were sent.
        request: the request's head, as it was sent.
        body: unpacked; empty unless the status is 2xx.
        whole: whether the body is complete (False: cut at the limit, where that was allowed).
        address: the server's IP address, or "".
        seconds: from the request to the last byte.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    status_line: str
    raw_headers: tuple[tuple[bytes, bytes], ...]
    request: bytes
    body: bytes
    whole: bool
    address: str
    seconds: float

    @property
    def content_type(self) -> str:
        """`text/html`, without parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class Fetcher:
    """Makes requests; to be used as `async with Fetcher(settings) as fetcher`.

    Raises:
        GroundupError: aiohttp or Protego are not installed.
    """

    def __init__(self, settings: CrawlSettings) -> None:
        try:
            import aiohttp
            import protego  # noqa: F401
        except ImportError as error:
            raise GroundupError(
                f"Crawling needs the package {error.name}, which is not installed.", "pip install 'groundup[crawl]'"
            ) from error
        self._aiohttp = aiohttp
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Fetcher:
        aiohttp = self._aiohttp
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                socket_factory=socket_factory(self._settings.allow_private),
                happy_eyeballs_delay=None,  # one address after the other, so that a refusal keeps its own name
            ),
            headers={
                "User-Agent": self._settings.user_agent,
                "Accept": ", ".join([*self._settings.types, "*/*;q=0.1"]),
                "Accept-Encoding": "gzip, deflate",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            response_class=_response_class(),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy of the environment would connect in our place, past the rule on addresses
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        accept: Callable[[Mapping[str, str]], None] = lambda headers: None,
        cut: bool = False,
    ) -> Response:
        """Ask for an address.

        Args:
            url: a normalized address.
            max_bytes: limit of the body, packed and unpacked.
            accept: raises `Refused` for headers whose body is not wanted.
            cut: whether a longer body is cut off instead of refused.

        Raises:
            Refused: no usable answer; any status but 2xx, 3xx redirects and 4xx is a refusal too.
        """
        from aiohttp.http_exceptions import HttpProcessingError

        started = _Started()
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                return await self._get(url, max_bytes, accept, cut, started)
        except TimeoutError as error:
            # A server that answered and then sent slowly will do so again; one that did not answer may have been busy.
            what = f"not whole after {self._settings.timeout_seconds:g} s" if started.answered else "no answer in time"
            raise Refused(Refusal.TIMEOUT, what, again=not started.answered) from error
        except (self._aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise self._refusal(error) from error

    async def _get(
        self, url: str, max_bytes: int, accept: Callable[[Mapping[str, str]], None], cut: bool, started: _Started
    ) -> Response:
        from yarl import URL

        assert self._session is not None
        begin = time.perf_counter()
        async with self._session.get(URL(url, encoded=True), allow_redirects=False) as answer:
            started.answered = True
            headers = _joined(answer.raw_headers)
            _check_status(answer.status, headers)
            body, whole = b"", True
            if 200 <= answer.status < 300:
                accept(headers)
                body, whole = await _body(answer, headers, max_bytes, cut)
            if not whole or not 200 <= answer.status < 300:
                answer.close()  # what is still to come is not read
            version = answer.version or self._aiohttp.HttpVersion11
            sent = answer.request_info
            return Response(
                url=url,
                status=answer.status,
                headers=headers,
                status_line=f"HTTP/{version.major}.{version.minor} {answer.status} {answer.reason or ''}".rstrip(),
                raw_headers=tuple(answer.raw_headers),
                request=_request_head(sent.method, sent.url.raw_path_qs, sent.headers),
                body=body,
                whole=whole,
                address=getattr(answer, "address", ""),
                seconds=time.perf_counter() - begin,
            )

    def _refusal(self, error: Exception) -> Refused:
        aiohttp = self._aiohttp
        inner: BaseException | None = error
        while inner is not None:
            if isinstance(inner, PrivateAddress):
                return Refused(Refusal.PRIVATE, str(inner.args[0]))
            inner = getattr(inner, "os_error", None) or inner.__cause__
        said = getattr(error, "message", "") or str(error) or type(error).__name__
        text = said.strip().splitlines()[0][:120]
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return Refused(Refusal.CONNECTION, "the name is not known", again=True)
        if isinstance(error, aiohttp.ClientSSLError):
            return Refused(Refusal.CONNECTION, text)
        if isinstance(error, aiohttp.InvalidURL):
            return Refused(Refusal.BAD_URL, text)
        if isinstance(error, aiohttp.ClientPayloadError):
            return Refused(Refusal.CUT_OFF, "the connection ended before the page did", again=True)
        if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
            return Refused(Refusal.CONNECTION, text, again=True)
        return Refused(Refusal.BAD_RESPONSE, text)


def _response_class() -> type[aiohttp.ClientResponse]:
    """aiohttp's response, which also remembers whom it came from: a short one lets go of its connection at once."""
    from aiohttp import ClientResponse

    class AddressedResponse(ClientResponse):
        address = ""

        async def start(self, connection: Connection) -> ClientResponse:
            peer = connection.transport.get_extra_info("peername") if connection.transport is not None else None
            self.address = str(peer[0]) if peer else ""
            return await super().start(connection)

    return AddressedResponse


@dataclass
class _Started:
    answered: bool = False


def _joined(raw: tuple[tuple[bytes, bytes], ...]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, value in raw:
        key, text = name.decode("latin-1").lower(), value.decode("utf-8", "surrogateescape")
        joined[key] = f"{joined[key]}, {text}" if key in joined and key != "location" else text
    return joined


def _check_status(status: int, headers: Mapping[str, str]) -> None:
    if status >= 500 or status in _PASSING_STATUSES:
        wait = retry_after_seconds(headers.get("retry-after", ""))
        raise Refused(Refusal.SERVER_ERROR, f"HTTP {status}", again=True, wait_seconds=wait)
    if status < 200 or (status < 400 and status >= 300 and status not in REDIRECTS):
        raise Refused(Refusal.STATUS, f"HTTP {status}")


def retry_after_seconds(value: str, now: datetime | None = None) -> float | None:
    """The pause a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds, or a date); None if it says nothing."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


async def _body(
    answer: aiohttp.ClientResponse, headers: Mapping[str, str], max_bytes: int, cut: bool
) -> tuple[bytes, bool]:
    """The body, unpacked as it arrives and never further than the limit; and whether it is whole."""
    length = headers.get("content-length", "")
    if not cut and length.isascii() and length.isdigit() and int(length[:18]) > max_bytes:
        raise Refused(Refusal.TOO_LARGE, f"says it has {int(length[:18]):,} bytes")
    unpacker = _Unpacker(headers.get("content-encoding", ""))
    parts: list[bytes] = []
    packed = size = 0
    async for piece in answer.content.iter_chunked(_STEP_BYTES):
        packed += len(piece)
        for part in unpacker.feed(piece):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                break
        if size > max_bytes or packed > max_bytes + _STEP_BYTES:
            if cut:
                return b"".join(parts)[:max_bytes], False
            raise Refused(Refusal.TOO_LARGE, f"more than {max_bytes:,} bytes")
    unpacker.end()
    return b"".join(parts), True


class _Unpacker:
    """Content-Encoding, undone in steps of a bounded size: a decompression bomb is stopped early."""

    def __init__(self, encoding: str) -> None:
        self._name = encoding.strip().lower()
        self._wbits = {"gzip": 31, "x-gzip": 31, "deflate": 15}.get(self._name)
        if self._wbits is None and self._name not in ("", "identity"):
            raise Refused(Refusal.ENCODING, f"{encoding[:40]!r}, which we did not ask for")
        self._stream: Any = None
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Unpack a piece.

        Raises:
            Refused: it is not what its header says.
        """
        if self._wbits is None:
            yield data
            return
        while data:
            if self._stream is None:
                if self._begun and not data.startswith(b"\x1f\x8b"):
                    return  # padding after the last gzip member
                raw_deflate = self._name == "deflate" and data[0] & 0x0F != 8
                self._stream = zlib.decompressobj(-15 if raw_deflate else self._wbits)
                self._begun = True
            try:
                part = self._stream.decompress(data, _STEP_BYTES)
            except zlib.error as error:
                raise Refused(Refusal.ENCODING, f"broken {self._name} ({error})") from error
            if part:
                yield part
            if self._stream.eof:
                data, self._stream = self._stream.unused_data, None
            elif not part and not self._stream.unconsumed_tail:
                return
            else:
                data = self._stream.unconsumed_tail

    def end(self) -> None:
        """Refuse a stream that stops in the middle."""
        if self._stream is not None:
            raise Refused(Refusal.CUT_OFF, f"the {self._name} stream stops in the middle", again=True)


def _request_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
