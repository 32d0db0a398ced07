"""C4's line rules: what goes, what stays, and that what is left is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.quality.lines import LINE_RULES, clean_lines, line_rules_of

GOOD = "This line has words and ends well."


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("This line just stops", "terminal punctuation"),
        ("This one trails off...", "terminal punctuation"),
        ("Too short.", "few words"),
        ("Please enable JavaScript to go on.", "javascript"),
        ("Read our Privacy Policy before you go on.", "policy"),
        ("This site uses cookies, as all do.", "policy"),
        ("See the terms of use for more.", "policy"),
        (f"A long {'x' * 1001} word is here.", "long word"),
    ],
)
def test_each_rule_takes_its_line(line: str, rule: str) -> None:
    text, counts = clean_lines(f"{GOOD}\n{line}\n{GOOD}")
    assert text == f"{GOOD}\n{GOOD}"
    assert {name: count for name, count in counts.items() if count} == {rule: 1}
    others = set(LINE_RULES) - {rule}
    assert clean_lines(f"{GOOD}\n{line}", others)[0] == f"{GOOD}\n{line}", "only that rule takes it"


@pytest.mark.parametrize(
    "line", ["Is it so?", "He said it!", 'She said "no way"', "They said ‘never again’", f"It is {'x' * 1000} wide."]
)
def test_good_lines_stay(line: str) -> None:
    text, counts = clean_lines(line)
    assert text == line
    assert not any(counts.values())


def test_citations_go_and_the_line_stays() -> None:
    text, counts = clean_lines("It is so.[1][23] Or not.[citation needed] Really.[edit]\nSee [a] and [12b] there.")
    assert text == "It is so. Or not. Really.\nSee [a] and [12b] there."
    assert counts["citations"] == 4


def test_presets() -> None:
    assert line_rules_of(("c4",)) == line_rules_of(("fineweb", "c4")) == set(LINE_RULES)
    assert line_rules_of(("gopher", "fineweb")) == set(LINE_RULES) - {"terminal punctuation"}
    assert line_rules_of(("gopher", "gentle")) == line_rules_of(("none",)) == frozenset()
    assert clean_lines("A heading of words", line_rules_of(("fineweb",)))[0] == "A heading of words"


def test_paragraphs_stay_apart_and_nothing_may_be_left() -> None:
    assert clean_lines(f"\n\n{GOOD}\n\n\nMenu\n\n{GOOD}\n{GOOD}\n\n")[0] == f"{GOOD}\n\n{GOOD}\n{GOOD}"
    assert clean_lines("Menu\nHome\n")[0] == clean_lines("")[0] == clean_lines(" \n \n")[0] == ""


LINES = st.lists(
    st.sampled_from(
        [GOOD, "Menu", "", " ", "Is that so?[1]", "We use cookies here, dear.", "a b c...", "[[1]2] is it."]
    ),
    max_size=20,
).map("\n".join)


@given(LINES | st.text(max_size=200), st.sets(st.sampled_from(sorted(LINE_RULES))))
def test_a_clean_text_has_nothing_left_to_take_but_citations(text: str, rules: set[str]) -> None:
    left, counts = clean_lines(text, rules)
    assert set(counts) == rules
    lines = [line for line in text.split("\n") if line.strip()]
    taken = sum(count for rule, count in counts.items() if rule != "citations")
    if "citations" not in rules:
        assert len([line for line in left.split("\n") if line]) == len(lines) - taken
        assert clean_lines(left, rules) == (left, dict.fromkeys(rules, 0))
