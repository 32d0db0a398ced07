"""LAWS.md names tests that there are, and of each law one that `make test` runs."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

HERE = Path(__file__).parent


@functools.cache
def names_in(name: str) -> dict[str, bool]:
    """The tests of a file without their `test_`, and whether `make test` leaves each out."""
    tree = ast.parse((HERE / f"test_{name}.py").read_text(encoding="utf-8"))
    found = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {
        node.name.removeprefix("test_"): any(ast.unparse(mark) == "pytest.mark.long" for mark in node.decorator_list)
        for node in found
        if node.name.startswith("test_")
    }


def test_every_law_has_tests_that_there_are_and_one_that_is_not_long() -> None:
    text = (HERE / "LAWS.md").read_text(encoding="utf-8")
    laws = re.findall(r"^\| (.+?) \| (\*\*.+) \|$", text, re.MULTILINE)
    assert len(laws) > 80
    for law, cell in laws:
        lengths = []
        for file, names in re.findall(r"\*\*(\w+)\*\* ((?:`\w+`(?:, )?)+)", cell):
            known = names_in(file)
            wanted = re.findall(r"`(\w+)`", names)
            assert set(wanted) <= set(known), f"{law}: test_{file}.py has no {set(wanted) - set(known)}"
            lengths += [known[name] for name in wanted]
        assert len(lengths) == cell.count("`") // 2, f"{law}: {cell} cannot be read"
        assert not all(lengths), f"{law}: only make test-long tries it"


def test_what_holds_a_law_that_lost_its_test_is_there() -> None:
    text = (HERE / "LAWS.md").read_text(encoding="utf-8").partition("## What is no longer")[2]
    known = {name for path in HERE.glob("test_*.py") for name in names_in(path.stem.removeprefix("test_"))}
    named = set(re.findall(r"`(\w+)`", text)) - {"long"}
    assert named
    assert named <= known, named - known
