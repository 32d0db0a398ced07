"""Code that a recipe names: nothing of it runs before it is trusted."""

from pathlib import Path

import pytest
from command import CommandLine, groundup

from groundup.errors import DataError
from groundup.user_code import TRUST_ALL, load_function

__all__ = ["groundup"]


def test_code_runs_only_when_it_is_trusted_and_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groundup: CommandLine
) -> None:
    monkeypatch.delenv(TRUST_ALL)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    mine, ran = tmp_path / "mine.py", tmp_path / "ran"
    mine.write_text(f"open({str(ran)!r}, 'w').close()\ndef score(*_): return 1.0\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"groundup trust {mine}"):
        load_function(f"{mine}:score", "[align.grpo] reward")
    assert not ran.exists()
    assert groundup("trust", mine).code == 0
    assert load_function(f"{mine}:score", "[align.grpo] reward")() == 1.0
    mine.write_text("def score(*_): return 2.0\n", encoding="utf-8")
    with pytest.raises(DataError, match="is code"):
        load_function(f"{mine}:score", "[align.grpo] reward")
    monkeypatch.setenv(TRUST_ALL, "1")
    assert load_function(f"{mine}:score", "[align.grpo] reward")() == 2.0
