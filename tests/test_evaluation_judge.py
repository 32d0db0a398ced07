"""Win rates: what verdicts come to, whom the places favour, and what is left when a judge breaks down."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import CommandLine, groundup
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from tiny_run import finished_run

from groundup.errors import DataError, GroundupError
from groundup.evaluation import judge as judging
from groundup.evaluation.judge import Pair, Verdict, by_url, judge_pairs, verdict_in, win_rate
from groundup.evaluation.metrics import wilson
from groundup.evaluation.prompts import Prompt, read_prompts
from groundup.user_code import trust

__all__ = ["groundup"]

PAIRS = [Pair(f"Question {n}", "a" * (n % 5), "b" * (n % 3)) for n in range(12)]


def test_a_win_takes_both_places_and_all_else_is_a_tie() -> None:
    """Won, lost, two ties of a judge that favours a place or nobody, one without a verdict."""
    found = win_rate([(1.0, -2.0), (-1.0, 0.5), (1.0, 1.0), (0.0, -1.0), (1.0, None), (1.0, -1.0)])
    assert found is not None
    assert (found.wins, found.losses, found.ties, found.n, found.n_without) == (2, 1, 2, 5, 1)
    assert found.value == (2 + 2 / 2) / 5
    assert found.first_place is not None
    assert (found.first_place.value, found.first_place.n) == (6 / 10, 10)
    assert win_rate([(None, 1.0)]) is None


@pytest.mark.parametrize(("n_won", "n"), [(0, 3), (2, 4), (7, 9), (40, 40)])
def test_the_interval_is_wilsons(n_won: int, n: int) -> None:
    known = binomtest(n_won, n).proportion_ci(method="wilson")
    assert wilson(n_won / n, n) == pytest.approx((known.low, known.high), abs=1e-4)


def test_a_judge_that_favours_a_place_prefers_nobody(tmp_path: Path) -> None:
    verdicts = judge_pairs(PAIRS, lambda *_: 1.0, "first", tmp_path / "verdicts.jsonl")
    found = win_rate(verdicts)
    assert found is not None
    assert found.value == 0.5
    assert found.first_place is not None
    assert found.first_place.value == 1.0


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=12))
def test_swapped_models_have_the_mirrored_win_rate_without_another_question(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[int, int]]
) -> None:
    pairs = [Pair(str(n), f"one {n}", f"other {n}") for n in range(len(said))]
    known = {pair: float(a) for pair, (a, _) in zip(pairs, said, strict=True)}
    known |= {pair.swapped(): float(b) for pair, (_, b) in zip(pairs, said, strict=True)}
    kept = tmp_path_factory.mktemp("judged") / "verdicts.jsonl"
    found = win_rate(judge_pairs(pairs, lambda *shown: known[Pair(*shown)], "table", kept))
    swapped = win_rate(judge_pairs([pair.swapped() for pair in pairs], unasked, "table", kept))
    assert found is not None
    assert swapped is not None
    assert (found.value, found.low, found.high) == pytest.approx((1 - swapped.value, 1 - swapped.high, 1 - swapped.low))
    assert (found.wins, found.losses, found.first_place) == (swapped.losses, swapped.wins, swapped.first_place)


def unasked(prompt: str, first: str, second: str) -> Verdict:
    raise AssertionError("asked again")


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    found = win_rate(judge_pairs([Pair("x", "same", "same")], unasked, "", tmp_path / "verdicts.jsonl"))
    assert found is not None
    assert (found.value, found.ties, found.first_place) == (0.5, 1, None)


def test_what_stands_there_is_not_asked_again_but_of_another_judge(tmp_path: Path) -> None:
    kept, n_asked = tmp_path / "verdicts.jsonl", 0

    def counting(prompt: str, first: str, second: str) -> Verdict:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 9:
            raise KeyboardInterrupt
        return len(first) - len(second) + 0.5

    with pytest.raises(KeyboardInterrupt):
        judge_pairs(PAIRS, counting, "one", kept)
    kept.write_bytes(kept.read_bytes()[:-9])  # as a process leaves it that was killed while it wrote
    found = judge_pairs(PAIRS, counting, "one", kept)
    n_all = len({pair for one in PAIRS for pair in (one, one.swapped()) if pair.first != pair.second})
    assert n_asked == n_all + 2  # one raised, one was cut off
    assert judge_pairs(PAIRS, unasked, "one", kept) == found
    judge_pairs(PAIRS, counting, "another", kept)
    assert n_asked == 2 * n_all + 2
    assert judge_pairs(PAIRS, unasked, "one", kept) == found


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Both are fine, but A says why. [[A]]", 1.0),
        ("Not [[A]], though it is long: [[B]]", -1.0),
        ("[[C]]", 0.0),
        (" B.\n", -1.0),
        ("Answer A is better.", None),
        ("", None),
        ("[[D]]", None),
    ],
)
def test_a_verdict_is_the_last_one_in_the_reply(reply: str, verdict: Verdict) -> None:
    assert verdict_in(reply) == verdict


# A server that breaks down


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
GOOD = (200, event("Because. ") + event("[[A]]") + DONE)
FAULTS = {
    "an error": (500, b'{"error": {"message": "out of memory"}}'),
    "an error in no words": (503, b"<html>"),
    "half a JSON": (200, event("[[") + b'data: {"choices": [{"del'),
    "no end": (200, event("[[A]]")),
    "another protocol": (200, b"<html><body>It works!</body></html>"),
    "silence": (4.0, event("[[A]]") + DONE),
    "no word for a long time": (0.0, b": wait\n\n" * 12 + event("[[A]]") + DONE),
    "no line for a long time": (0.0, b"\r" * 150 + event("[[A]]") + DONE),
    "a broken connection": (None, b""),
}


class Server:
    """Answers every question by `say`, which is given their number so far."""

    def __init__(self, say: Callable[[int], tuple[Any, bytes]]) -> None:
        self.n_asked, lock, owner = 0, threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, b'{"data": [{"id": "wise"}, {"id": "other"}]}')

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    owner.n_asked += 1
                    status, body = say(owner.n_asked)
                if status is not None:
                    time.sleep(status if isinstance(status, float) else 0)
                    self.answer(status if isinstance(status, int) else 200, body, slowly=status == 0.0)

            def answer(self, status: int, body: bytes, slowly: bool = False) -> None:
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for line in body.splitlines(keepends=True):
                        self.wfile.write(line)
                        time.sleep(0.03 * slowly)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_fails_once_is_asked_again(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_WAITS", (0.01,))
    with Server(lambda n: FAULTS[fault] if n % 2 else GOOD) as server:
        (judge, _), began = by_url(server.url, "wise", seconds=0.3), time.monotonic()
        assert judge("Hello?", "Hi", "Go away") == 1.0
        assert server.n_asked == 2
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_stays_down_loses_no_verdict_and_the_same_call_goes_on(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "_WAITS", (0.01, 0.01))
    kept, pairs, is_up = tmp_path / "verdicts.jsonl", PAIRS[1:5], False
    with Server(lambda n: GOOD if n <= 5 or is_up else FAULTS[fault]) as server:
        judge, _ = by_url(server.url, seconds=0.3)
        with pytest.raises(GroundupError):
            judge_pairs(pairs, judge, "wise", kept, workers=2)
        n_kept = len(kept.read_text().splitlines())
        assert n_kept == 5
        is_up, n_before = True, server.n_asked
        verdicts = judge_pairs(pairs, judge, "wise", kept, workers=2)
        assert server.n_asked - n_before == 2 * len(pairs) - n_kept
    assert verdicts == [(1.0, 1.0)] * len(pairs)


# The command


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("GROUNDUP_TRUST", raising=False)
    monkeypatch.setattr(judging, "_WAITS", (0.01,))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(6)))
    return path


def models() -> list[Path]:
    return [finished_run().folder(stage) for stage in ("sft", "pretrain")]


def test_a_function_of_the_users_judges_when_it_is_trusted(groundup: CommandLine, prompts: Path) -> None:
    mine = prompts.with_name("mine.py")
    mine.write_text("def better(prompt, first, second):\n    return (first > second) - (first < second)\n")
    asked = ("judge", *models(), "--prompts", prompts, "--judge", f"{mine}:better", "-n", "8")
    assert "groundup trust" in groundup(*asked).err
    trust(mine)
    found = groundup(*asked, "--json").json
    assert (found["n"], found["wins"] + found["losses"] + found["ties"]) == (6, 6)
    assert found["first"]["distinct_1"]["n"] <= 6
    backwards = groundup("judge", *reversed(models()), *asked[3:], "--json").json
    assert backwards["value"] == pytest.approx(1 - found["value"])
    said = groundup(*asked).out
    assert "of 6 pairs" in said
    assert "distinct_1" in said
    mine.write_text("def better(prompt, first, second):\n    return {}\n")
    trust(mine)
    assert "mine.py:better: fails" in " ".join(groundup(*asked).err.split())


def test_a_judge_without_verdicts_and_one_that_goes_down_are_told(groundup: CommandLine, prompts: Path) -> None:
    asked = ("judge", *models(), "--prompts", prompts, "-n", "8", "--timeout", "0.5")
    nonsense = (200, event("I like cats.") + DONE)
    is_up = False

    def say(n: int) -> tuple[Any, bytes]:
        return nonsense if n <= 2 else GOOD if n <= 6 or is_up else FAULTS["an error"]

    with Server(say) as server:
        stopped = groundup(*asked, "--judge", server.url)
        assert stopped.code == 1
        assert "out of memory" in stopped.err
        assert " ".join(stopped.err.split()).count("answers 6 ") == 2
        assert "the same command goes on" in stopped.err
        is_up = True
        done = groundup(*asked, "--judge", server.url)
        assert done.code == 0
        assert "not counted: the judge's reply is no verdict" in done.out
        assert "the first place is preferred in 100.0%" in done.out
        unknown = groundup(*asked, "--judge", server.url, "--judge-model", "nobody")
        assert "There are: wise, other" in unknown.err
    assert "no server answers there" in groundup(*asked, "--judge", server.url).err


def test_prompts_of_a_file_and_of_a_set(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "harmful": true}\n{"prompt": "two"}\n')
    assert read_prompts(str(path)) == [Prompt("one", True), Prompt("two", None)]
    table = tmp_path / "a.csv"
    table.write_text("prompt,harmful\none,true\ntwo,False\nthree,\n")
    assert [one.is_harmful for one in read_prompts(str(table))] == [True, False, None]
    assert {one.is_harmful for one in read_prompts("groundup:harm", limit=30)} == {True, False}
    assert len(read_prompts("groundup:first-messages", limit=7)) == 7
    for line, words in (
        ('{"prompt": ["x"]}', "record 2"),
        ('{"prompt": "x", "harmful": "no"}', "record 2"),
        ('{"prompt": "x", "harmful": 1}', "record 2"),
        ('{"prompt": "x", "harmful": 0}', "record 2"),
        ("{", "line 2"),
    ):
        path.write_text(f'{{"prompt": "one"}}\n{line}\n')
        with pytest.raises(DataError, match=words):
            read_prompts(str(path))
