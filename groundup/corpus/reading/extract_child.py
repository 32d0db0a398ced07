"""The process that takes text out of HTML pages: it is sent pages, and sends their texts back.

It runs as a script of its own, so that it holds an extractor and nothing else of groundup, and so that a crash, a
hang or a leak of native code ends here. It ends when its connection does, so it outlives its parent by a page at most,
and a page never takes longer than the kernel's timers allow.

A page is two messages, its address and its bytes; an answer is one: its kind (a byte) and UTF-8. The first answer comes
without a page and says that the extractor is loaded.
"""

from __future__ import annotations

import codecs
import gc
import re
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

TEXT, FAILED, NO_MEMORY, NOT_LOADED = range(4)
"""Kinds of answers: the text ("" where there is none), an exception of the extractor, out of memory, no extractor."""

HANG_FACTOR = 4
"""A page may take so many times its seconds of processor time by the clock: the machine may be busy."""

_META = re.compile(rb"""<meta\b[^>]{0,400}?\bcharset\s*=\s*["']?\s*([A-Za-z0-9_.:+-]{2,40})""", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml\b[^>]{0,200}?\bencoding\s*=\s*["']([A-Za-z0-9_.:+-]{2,40})["']""", re.IGNORECASE)
_TAG = re.compile(rb"<[^<>]*>")
_META_WITHIN_BYTES = 8192
_DETECT_WITHIN_BYTES = 1 << 17
_ASCII = bytes(range(128))
_AGREEING = 20  # of so many bytes beyond ASCII one may break the encoding
_MARKED = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
BYTE_ORDER_MARKS = tuple(mark for mark, _ in _MARKED)


def main() -> None:
    """Serve pages until the connection ends. Arguments: the extractor, seconds for a page, MiB of memory, its file."""
    kind, seconds, memory_mib, connection = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    _default_signals()
    with Connection(connection) as parent:
        try:
            extract = load(kind)
        except Exception as error:
            _answer(parent, NOT_LOADED, f"{type(error).__name__}: {error}")
            return
        gc.freeze()
        _limit_memory(memory_mib)
        _answer(parent, TEXT, "")
        found = TEXT
        while found != NO_MEMORY:
            try:
                url, html = parent.recv_bytes().decode(), parent.recv_bytes()
            except (EOFError, OSError):
                return
            _set_timers(seconds)
            found, text = _attempt(extract, html, url)
            _set_timers(0.0)
            _answer(parent, found, text)


def load(kind: str) -> Callable[[str, str], str | None]:
    """The function that takes a page and its address and gives its text.

    Args:
        kind: "trafilatura" or "resiliparse".

    Raises:
        ImportError: it is not installed.
    """
    if kind == "resiliparse":
        from resiliparse.extract.html2text import extract_plain_text

        return lambda html, url: extract_plain_text(html, main_content=True, alt_texts=False, comments=False)
    import logging

    from trafilatura import extract

    logging.disable(logging.CRITICAL)
    # Without the fallbacks of the slow mode (F1 0.963 against 0.953 on the article extraction benchmark), with tables,
    # without comments. `deduplicate` would make a page's text depend on the pages before it.
    return lambda html, url: extract(
        html, url=url or None, fast=True, include_comments=False, include_tables=True, deduplicate=False,
        with_metadata=False, output_format="txt",
    )  # fmt: skip


_SEVEN_BIT = ((b"\x1b$)C", "iso2022_kr"), (b"\x1b$", "iso2022_jp_2"), (b"~{", "hz"))
"""What encodings of ASCII bytes change to another alphabet with."""
_PLAIN = bytes(code for code in range(256) if code >= 32 or code in b"\0\t\n\v\f\r")
# Extractors leave control characters out, and with them the sign that the encoding was another one.
_CONTROL = re.compile("[\x01-\x08\x0e-\x1f\x80-\x84\x86-\x9f]")


def decode_html(data: bytes) -> str:
    """A page's characters.

    Its encoding is, in this order: that of its byte order mark; UTF-8, if the bytes are that, whatever the page says,
    for nothing else looks like UTF-8 by chance; the one that its XML declaration or `<meta>` names, with the meanings
    that browsers give to the names (WHATWG, Encoding, 4.2), if the bytes agree; the one that a detector guesses.
    """
    for mark, encoding in _MARKED:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace").replace("\0", "")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = _CONTROL.sub("\ufffd", _decode_other(data))
    else:
        if data.isascii():  # as the bytes of ISO-2022-JP and its relatives are
            kinds = [_declared(data)] if b"\x1b" in data else []
            kinds += [encoding for mark, encoding in _SEVEN_BIT if mark in data]
            text = next(filter(None, (_decode_as(data, encoding) for encoding in kinds)), text)
            if data.translate(None, _PLAIN):
                text = _CONTROL.sub("\ufffd", text)
    return text.replace("\0", "") if b"\0" in data else text


def _decode_other(data: bytes) -> str:
    """A page that is not UTF-8 throughout."""
    declared = _declared(data)
    text = _decode_mostly(data, "utf-8") or _decode_as(data, declared) or _decode_mostly(data, declared)
    if text is not None:
        return text
    from resiliparse.parse.encoding import detect_encoding

    # Of the names that HTML knows it gives none for Korean, and it takes the traditional Chinese for simplified.
    guess = detect_encoding(data[:_DETECT_WITHIN_BYTES], html5_compatible=False)
    if guess == "gb18030":
        from charset_normalizer import from_bytes

        best = from_bytes(_TAG.sub(b" ", data[:_DETECT_WITHIN_BYTES]), cp_isolation=["gb18030", "big5"]).best()
        guess = best.encoding if best else guess
    return data.decode((known_encoding(guess) if guess else None) or declared or "utf-8", "replace")


def _decode_mostly(data: bytes, encoding: str | None) -> str | None:
    """The text, if all but a few of the bytes beyond ASCII fit the encoding (a cut character, a name in another)."""
    if encoding is None:
        return None
    text = data.decode(encoding, "replace")
    n_beyond_ascii = len(data.translate(None, _ASCII))
    return text if text.count("\ufffd") * _AGREEING <= n_beyond_ascii else None


def _declared(data: bytes) -> str | None:
    beginning = data[:_META_WITHIN_BYTES]
    found = _XML.search(beginning) or _META.search(beginning)
    encoding = known_encoding(found.group(1).decode("ascii")) if found else None
    # A declaration that can be read byte by byte is not in UTF-16.
    return "utf-8" if encoding and encoding.startswith(("utf-16", "utf-32")) else encoding


def known_encoding(label: str) -> str | None:
    """Python's name of an encoding that HTML names, or None."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label, fallback_utf8=False) or label
    name = {"big5": "big5hkscs", "shift_jis": "cp932", "euc-kr": "cp949", "gbk": "gb18030"}.get(name.lower(), name)
    try:
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        return None


def _decode_as(data: bytes, encoding: str | None) -> str | None:
    try:
        return data.decode(encoding) if encoding else None
    except (UnicodeDecodeError, LookupError):
        return None


def _attempt(extract: Callable[[str, str], str | None], html: bytes, url: str) -> tuple[int, str]:
    """Kind and rest of the answer."""
    try:
        return TEXT, (extract(decode_html(html), url) or "").strip()
    except MemoryError as error:
        return NO_MEMORY, str(error)
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {error}"[:300]


def _default_signals() -> None:
    """Whatever the parent ignores or blocks, the timers must end this process; Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _set_timers(seconds: float) -> None:
    """SIGPROF after so many seconds of processor time, SIGALRM if it hangs without using any; 0: none."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, HANG_FACTOR * seconds)


def _limit_memory(memory_mib: float) -> None:
    """So much address space beyond what the loaded extractor has already; where the system knows such a limit."""
    try:
        import resource

        with open("/proc/self/statm") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        limit = taken + int(memory_mib * 2**20)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):
        pass


def _answer(parent: Connection, kind: int, text: str) -> None:
    parent.send_bytes(bytes([kind]) + text.encode("utf-8", "replace"))


if __name__ == "__main__":
    main()
