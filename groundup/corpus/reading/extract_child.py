"""The process that takes text out of HTML pages: it is sent pages, and sends their texts back.

A script of its own, so that it holds an extractor and nothing else of groundup, and so that a crash, a hang or a leak
of native code ends here. It ends when its standard input, a socket, does, and by SIGPROF when a page takes too long. A
page is two messages, its address and its bytes; an answer is one: "+" and the text, or "-" and what went wrong. The
first answer comes without a page and says whether the extractor is loaded.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

OUT_OF_MEMORY = 99  # the exit code of a process that had not enough for a page
_DECLARED = re.compile(
    rb"""(?:\A\s*<\?xml\b[^>]{0,200}?\bencoding|<meta\b[^>]{0,400}?\bcharset)\s*=\s*["']?\s*([\w.:+-]{2,40})""",
    re.IGNORECASE,
)
_META_WITHIN_BYTES, _DETECT_WITHIN_BYTES = 8192, 1 << 17
_AGREEING = 20  # of so many bytes beyond ASCII one may break the encoding
_MARKED = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
_SEVEN_BIT = {b"\x1b$)C": "iso2022_kr", b"\x1b$": "iso2022_jp_2", b"~{": "hz"}  # what changes the alphabet
_PLAIN = bytes(code for code in range(256) if code >= 32 or code in b"\0\t\n\v\f\r")
# Extractors leave control characters out, and with them the sign that the encoding was another one.
_CONTROL = re.compile("[\x01-\x08\x0e-\x1f\x80-\x84\x86-\x9f]")


def main() -> None:
    """Serve pages until the connection ends. Arguments: the extractor, seconds for a page, MiB of memory."""
    kind, seconds, memory_mib = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    with Connection(sys.stdin.fileno()) as parent, contextlib.suppress(EOFError, OSError):
        try:
            extract, answer = load(kind), "+"
        except Exception as error:
            answer = f"-{type(error).__name__}: {error}"
        # So much address space beyond what the loaded extractor has already, where the system knows such a limit.
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as statm:
            limit = int(statm.read().split()[0]) * resource.getpagesize() + int(memory_mib * 2**20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        while True:
            parent.send_bytes(answer.encode("utf-8", "replace"))
            url, html = parent.recv_bytes().decode(), parent.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                answer = "+" + (extract(decode_html(html), url) or "").strip()
            except MemoryError:
                sys.exit(OUT_OF_MEMORY)
            except Exception as error:
                answer = f"-{type(error).__name__}: {error}"[:300]


def load(kind: str) -> Callable[[str, str], str | None]:
    """The function that takes a page and its address and gives its text; `kind` is "trafilatura" or "resiliparse"."""
    if kind == "resiliparse":
        from resiliparse.extract.html2text import extract_plain_text

        return lambda html, url: extract_plain_text(html, main_content=True, alt_texts=False, comments=False)
    from trafilatura import extract

    # Without the fallbacks of the slow mode (F1 0.963 against 0.953 on the article extraction benchmark), with tables,
    # without comments. `deduplicate` would make a page's text depend on the pages before it.
    return lambda html, url: extract(
        html, url=url or None, fast=True, include_comments=False, include_tables=True, deduplicate=False
    )


def decode_html(data: bytes) -> str:
    """A page's characters.

    Its encoding is, in this order: that of its byte order mark; UTF-8, if the bytes are that, whatever the page says,
    for nothing else looks like UTF-8 by chance; the one that its XML declaration or `<meta>` names, with the meanings
    that browsers give to the names (WHATWG, Encoding, 4.2), if the bytes agree; the one that a detector guesses.
    """
    for mark, encoding in _MARKED.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace").replace("\0", "")
    try:
        text = data.decode("utf-8")
        is_plain = not data.isascii() or not data.translate(None, _PLAIN)
        if data.isascii():
            others = (_fitting(data, encoding) for mark, encoding in _SEVEN_BIT.items() if mark in data)
            text = next(filter(None, others), text)
    except UnicodeDecodeError:
        found, is_plain = _DECLARED.search(data[:_META_WITHIN_BYTES]), False
        declared = known_encoding(found[1].decode("ascii")) if found else None
        if declared and declared.startswith(("utf-16", "utf-32")):  # not a declaration that is read byte by byte
            declared = "utf-8"
        text = _fitting(data, "utf-8") or _fitting(data, declared) or _guessed(data, declared)
    return (text if is_plain else _CONTROL.sub("\ufffd", text)).replace("\0", "")


def _guessed(data: bytes, declared: str | None) -> str:
    from resiliparse.parse.encoding import detect_encoding

    # Of the names that HTML knows it gives none for Korean, and it takes the traditional Chinese for simplified.
    guess = detect_encoding(data[:_DETECT_WITHIN_BYTES], html5_compatible=False)
    if guess == "gb18030":
        from charset_normalizer import from_bytes

        words = re.sub(rb"<[^<>]*>", b" ", data[:_DETECT_WITHIN_BYTES])
        best = from_bytes(words, cp_isolation=["gb18030", "big5"]).best()
        guess = best.encoding if best else guess
    return data.decode(known_encoding(guess) or declared or "utf-8", "replace")


def _fitting(data: bytes, encoding: str | None) -> str | None:
    """The text, if all but a few of the bytes beyond ASCII fit the encoding (a cut character, a name in another)."""
    text = data.decode(encoding, "replace") if encoding else "\ufffd" * len(data)
    n_beyond_ascii = len(data.translate(None, bytes(range(128))))
    return text if text.count("\ufffd") * _AGREEING <= n_beyond_ascii else None


def known_encoding(label: str | None) -> str | None:
    """Python's name of an encoding that HTML names, or None."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label or "", fallback_utf8=False) or label or ""
    name = {"big5": "big5hkscs", "shift_jis": "cp932", "euc-kr": "cp949", "gbk": "gb18030"}.get(name.lower(), name)
    try:
        b"".decode(name)  # LookupError: unknown, or no encoding of text
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        return None


def in_utf8(data: bytes, encoding: str) -> bytes:
    """A page in UTF-8 with the mark that outranks what it says of itself; unchanged where it is not in the `encoding`
    that its server's Content-Type named."""
    name = known_encoding(encoding)
    if not name or data.startswith(tuple(_MARKED)):
        return data
    with contextlib.suppress(UnicodeError):
        if not name.startswith(("iso2022", "hz")):  # their bytes are ASCII
            data.decode("utf-8")
            return data
    with contextlib.suppress(UnicodeError):
        return codecs.BOM_UTF8 + data.decode(name).encode()
    return data


if __name__ == "__main__":
    main()
