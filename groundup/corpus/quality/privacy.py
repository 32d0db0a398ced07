"""Private data to placeholders: e-mail addresses, phone numbers, IP addresses and credit cards.

In: a text. Out: the text with `<EMAIL>`, `<PHONE>`, `<IP>` and `<CREDIT_CARD>` in their place, and what was found,
with its surroundings, so that a person can judge it. A second pass finds nothing more.

Numbers are many things, so a number must look like what it is taken for and must not be a piece of something longer:
a version, an object identifier or the number of a section is no address, an ISBN or a date is no phone. What a rule
cannot tell by the number alone it decides by the words just before it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

EXCERPT_CHARACTERS = 30
"""How much of the text on either side of a finding is shown with it."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """One thing that was replaced.

    Attributes:
        kind: "email", "credit_card", "ip" or "phone".
        found: what stood there.
        excerpt: the same within its surroundings, on one line; what was replaced before it shows as a placeholder.
    """

    kind: str
    found: str
    excerpt: str


def replace_private(text: str, kinds: Sequence[str]) -> tuple[str, list[Replacement]]:
    """Replace what looks private: some of "email", "credit_card", "ip", "phone", in any order.

    Returns:
        The text with placeholders, and the findings: kind by kind, each in the order of the text.
    """
    findings: list[Replacement] = []
    for kind in (kind for kind in _FINDERS if kind in kinds):
        pieces: list[str] = []
        done = 0
        for start, end in _FINDERS[kind](text):
            # What touches a placeholder is left alone, or a second pass would find what the first saw as one word.
            if start < done or text.endswith(_PLACEHOLDERS, 0, start) or text.startswith(_PLACEHOLDERS, end):
                continue
            pieces += (text[done:start], f"<{kind.upper()}>")
            done = end
            excerpt = text[max(0, start - EXCERPT_CHARACTERS) : end + EXCERPT_CHARACTERS]
            findings.append(Replacement(kind, text[start:end], " ".join(excerpt.split())))
        text = "".join([*pieces, text[done:]])
    return text, findings


_WORD = r"0-9A-Z_a-zÀ-ԯ"
"""Letters (Latin, Greek, Cyrillic), digits: what a number may not touch. Scripts without blanks may touch it."""

# --- e-mail: local part and domain as in RFC 5321, Latin letters only, nothing in quotes ---------------------------

_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9-])")
_LOCAL = re.compile(r"[A-Za-z0-9_À-ɏ][A-Za-z0-9._%+'À-ɏ-]{0,63}\Z")
_LOCAL_CHARACTERS = 64
_FILE_ENDINGS = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "json", "html", "md", "pdf"))


def _emails(text: str) -> Iterator[tuple[int, int]]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        if domain and domain[1].lower() not in _FILE_ENDINGS:  # logo@2x.png
            local = _LOCAL.search(text, max(0, at - _LOCAL_CHARACTERS), at)
            if local:
                yield local.start(), domain.end()
        at = text.find("@", at + 1)


# --- credit cards: length and first digits of an issuer (ISO/IEC 7812), grouped as on a card, and Luhn's check --------

_CARD = re.compile(
    rf"[2-6](?<![{_WORD}.,+/-].)[0-9]{{3}}(?:[0-9]{{9,15}}|(?:[ -][0-9]{{1,6}}){{2,4}})(?![{_WORD}]|[.,/-][0-9])"
)
_ISSUERS = tuple(
    (re.compile(start), frozenset(lengths))
    for start, lengths in (
        ("4", (13, 16, 19)),  # Visa
        ("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
        ("3[47]", (15,)),  # American Express
        ("3(?:0[0-5]|095|[689])", (14,)),  # Diners Club
        ("6(?:011|4[4-9]|5)|62", (16, 17, 18, 19)),  # Discover, UnionPay
        ("35(?:2[89]|[3-8])", (16, 17, 18, 19)),  # JCB
    )
)
_GROUPINGS = frozenset({(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 1)})


def _credit_cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        groups = re.split("[ -]", match[0])
        digits = "".join(groups)
        if len(groups) > 1 and (tuple(map(len, groups)) not in _GROUPINGS or (" " in match[0] and "-" in match[0])):
            continue
        issued = any(start.match(digits) and len(digits) in lengths for start, lengths in _ISSUERS)
        # Luhn's check: every second digit from the right doubled, the sum of all digits divisible by 10.
        from_right = [int(digit) for digit in reversed(digits)]
        total = sum(from_right[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in from_right[1::2])
        if issued and total % 10 == 0:
            yield match.span()


# --- IP addresses: public ones, not networks (….0) and not what is more likely a version ------------------------------

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"[1-9](?<![{_WORD}.+\\#-].)(?<![^/]/.)[0-9]{{0,2}}(?:\.{_OCTET}){{3}}(?![{_WORD}]|[.+-][{_WORD}])")
_IPV6 = re.compile(
    rf"[23](?<![{_WORD}.:/-].)[0-9A-Fa-f]{{3}}(?::[0-9A-Fa-f]{{0,4}}){{2,7}}(?![{_WORD}:]|[.-][{_WORD}])"
)
_SMALL_OCTET = 100
_BEFORE_CHARACTERS = 24
_SECTION_WORDS = re.compile(
    r"(?:\bvers?\.?|\bv\.?|\brev\.?|\bsec(?:tions?)?\.?|§|chapters?|clause|paragraph|article|\brule|\bpart|table|figure"
    r"|\bfig\.|appendix|annex|\bitem|\bstep|\boid|[a-z]-)[^\w@<>]{0,4}\Z",
    re.IGNORECASE,
)
_VERSION_WORDS = re.compile(
    r"(?:version|release|revision|build|firmware|driver|update|upgrade|patch|bump|kernel)"
    r"(?:[^\d@<>\n]|(?<=[A-Za-z])[0-9](?![\d.-])){0,20}\Z",
    re.IGNORECASE,
)
_ADDRESS_WORDS = re.compile(
    r"(?:\bip(?:v4)?\b|address|\bhosts?\b|server|\bdns\b|\bping|\bfrom\b|gateway|nameserver|subnet|netmask|login|client"
    r"|https?:|ssh|telnet|traceroute)[^\d@<>]{0,12}\Z|[a-z0-9]@\Z",
    re.IGNORECASE,
)
_PORT_BEHIND = re.compile(r"(?::[0-9]{2,5}|/[0-9]{1,2})(?![\w.])")


def _ips(text: str) -> Iterator[tuple[int, int]]:
    spans = [match.span() for match in _IPV4.finditer(text) if _is_public_ipv4(text, match)]
    for match in _IPV6.finditer(text) if ":" in text else ():
        with contextlib.suppress(ValueError):
            if ipaddress.IPv6Address(match[0]).is_global:
                spans.append(match.span())
    yield from sorted(spans)


def _is_public_ipv4(text: str, match: re.Match[str]) -> bool:
    octets = [int(octet) for octet in match[0].split(".")]
    if octets[0] > 255 or octets[3] == 0:
        return False
    start, end = match.span()
    before = text[max(0, start - _BEFORE_CHARACTERS) : start]
    if _SECTION_WORDS.search(before) or _VERSION_WORDS.search(before):
        return False
    # Four small numbers are most often a version, a section or an object identifier: they need a sign of an address.
    if max(octets) < _SMALL_OCTET and not (_ADDRESS_WORDS.search(before) or _PORT_BEHIND.match(text, end)):
        return False
    address = ipaddress.IPv4Address(match[0])
    return address.is_global and not address.is_multicast


# --- phone numbers ----------------------------------------------------------------------------------------------------

_JOINED = r".,+/=#%$€£@\\"
_SEPARATED = r"(?:[ .\-]|[ ]?\([0-9]{1,4}\)[ ]?|\)[ \-]?)?"
_PHONE = re.compile(
    rf"[+(0-9](?<![{_WORD}{_JOINED}-].)(?:"
    # international: + country code, 8 to 15 digits in all (ITU-T E.164)
    rf"(?<=\+)\(?[1-9](?:{_SEPARATED}[0-9]){{7,14}}"
    # area code in brackets
    r"|(?<=\()(?:[2-9][0-9]{2}\)[ -]{0,2}[0-9]{3}[ .-][0-9]{4}|0[0-9]{1,4}\)[ ]?[0-9]{2,4}(?:[ -]?[0-9]{2,4}){1,3})"
    # North America: 212-555-0123, 1.212.555.0123
    r"|(?:(?<=1)[ .-][2-9])?(?<=[2-9])[0-9]{2}(?P<nanp>[.-])[0-9]{3}(?P=nanp)[0-9]{4}"
    # with a zero for the trunk: 01 23 45 67 89, 020 7946 0958, 07700 900123
    r"|(?<=0)[1-9](?:(?P<pair>[ .-])[0-9]{2}(?:(?P=pair)[0-9]{2}){3}|[0-9]{1,2}[ ][0-9]{3,4}[ ][0-9]{3,4}"
    r"|[0-9]{3}[ ][0-9]{6})"
    rf")(?![{_WORD}]|[.,/: -][0-9])"
)
_BARE = re.compile(
    rf"[(0-9](?<![{_WORD}{_JOINED}-].)(?:(?<=\()[0-9]{{1,4}}\)|(?<=[0-9]))(?:[ ./()-]{{0,3}}[0-9]){{5,14}}"
    rf"(?![{_WORD}]|[.,/: -][0-9])"
)
_LEAST_DIGITS = 7
_LABEL = re.compile(
    r"(?:\b(?:tel(?:ephone)?|tél(?:éphone)?|telefon\w?|(?:tele)?phones?|fax|mobile|cell|call|contact|whatsapp|sms)\b|☎|📞)"
    r"[^\d@<>\n]{0,16}\Z",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}[ ./-][01]?[0-9][ ./-][0-3]?[0-9](?![0-9])|[0-3]?[0-9][./-][0-3]?[0-9][./-](?:19|20)[0-9]{2}"
)
_BOOK = re.compile(r"(?:is[bs]n|issn|doi|lccn|oclc)[\w:. -]{0,12}\Z", re.IGNORECASE)


def _phones(text: str) -> Iterator[tuple[int, int]]:
    spans = [match.span() for match in _PHONE.finditer(text)]
    # Other digits are a phone number only where the text says so.
    for match in _BARE.finditer(text):
        n_digits = sum(map(str.isdigit, match[0]))
        if n_digits >= _LEAST_DIGITS and _LABEL.search(text, max(0, match.start() - _BEFORE_CHARACTERS), match.start()):
            spans.append(match.span())
    for start, end in sorted(spans):
        before = text[max(0, start - _BEFORE_CHARACTERS) : start]
        if not (_DATE.match(text, start, end) or _BOOK.search(before)):
            yield start, end


_FINDERS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "email": _emails,
    "credit_card": _credit_cards,
    "ip": _ips,
    "phone": _phones,
}
_PLACEHOLDERS = tuple(f"<{kind.upper()}>" for kind in _FINDERS)
