"""C4's line rules, the only quality rules that change a text: they leave lines out and take citation marks away.

In: a text. Out: the text that is left, and how many lines each rule took. Source: C4 (arXiv:1910.10683, section
2.2) with what its code adds (long words, policies, citations). FineWeb (arXiv:2406.17557, section 3.5) uses all of
them but the terminal punctuation, which alone removes about 30 % of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from groundup.corpus.quality.textbatch import LINE_ENDS
from groundup.corpus.words import split_words

MIN_WORDS = 3
MAX_WORD_CHARACTERS = 1000

LINE_RULES: dict[str, str] = {
    "citations": "[1], [edit] and [citation needed] are taken out of the line (C4's code)",
    "long word": f"lines with a word of more than {MAX_WORD_CHARACTERS:,} characters go (C4's code)",
    "terminal punctuation": "lines that do not end in . ? ! or a quotation mark (any script's), or end in ..., go (C4)",
    "few words": f"lines of fewer than {MIN_WORDS} words go (C4)",
    "javascript": "lines with the word Javascript go (C4)",
    "policy": "lines about terms of use, privacy policies or cookies go (C4's code)",
}
"""Every line rule, in the order they are applied: what it does and who published it."""

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_TERMINAL = frozenset(LINE_ENDS) - {"…"}
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1}}}")


def line_rules_of(quality: Collection[str]) -> frozenset[str]:
    """The line rules that come with a recipe's `quality` presets: all with c4, all but one with fineweb."""
    if "c4" in quality:
        return frozenset(LINE_RULES)
    return frozenset(LINE_RULES) - {"terminal punctuation"} if "fineweb" in quality else frozenset()


def clean_lines(text: str, rules: Collection[str] | None = None) -> tuple[str, dict[str, int]]:
    """Apply line rules by name (None: all) to a text with lines ended by line feeds.

    Blank lines stay between what is kept, at most one at a time, so paragraphs are still to be seen.

    Returns:
        The text that is left ("" if nothing is), and by rule the lines that it took (for citations: the marks).
    """
    wanted = [rule for rule in LINE_RULES if rules is None or rule in rules]
    counts = dict.fromkeys(wanted, 0)
    if "citations" in wanted and "[" in text:
        text, counts["citations"] = _CITATION.subn("", text)
    checks = [(rule, _CHECKS[rule]) for rule in wanted if rule in _CHECKS]
    kept: list[str] = []
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            if kept and kept[-1]:
                kept.append("")
            continue
        for rule, takes in checks:
            if takes(line):
                counts[rule] += 1
                break
        else:
            kept.append(line)
    return "\n".join(kept).strip("\n"), counts


def _has_long_word(line: str) -> bool:
    if len(line) <= MAX_WORD_CHARACTERS or _LONG_WORD.search(line) is None:
        return False
    return max(map(len, split_words(line))) > MAX_WORD_CHARACTERS


_CHECKS: dict[str, Callable[[str], bool]] = {
    "long word": _has_long_word,
    "terminal punctuation": lambda line: line[-1] not in _TERMINAL or line.endswith("..."),
    "few words": lambda line: len(line.split(None, MIN_WORDS - 1)) < MIN_WORDS and len(split_words(line)) < MIN_WORDS,
    "javascript": lambda line: "javascript" in line.lower(),
    "policy": lambda line: bool(low := line.lower()) and any(phrase in low for phrase in _POLICIES),
}
