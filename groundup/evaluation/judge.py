"""Win rate: two models answer the same prompts, and a judge says whose answer is the better one.

A judge sees every pair twice, with the places swapped, since judges favour a place (arXiv:2306.05685, section 3.4): a
model wins where its answer is preferred both times; all else is a tie, equal answers too.

    win rate = (wins + ties / 2) / pairs        its interval: Wilson's (1927), a little too wide where there are ties

A verdict is a line of a file as soon as it is there, under what the judge was shown. So whatever becomes of the judge,
nothing is asked twice, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import orjson

from groundup.errors import GroundupError
from groundup.evaluation.metrics import Estimate, share, wilson
from groundup.files import append_line, value_digest
from groundup.generation import SamplingParams
from groundup.serving.client import Remote

Verdict = float | None
Judge = Callable[[str, str, str], Verdict]
"""(prompt, first answer, second answer) to a number: above 0 the first is better, below 0 the second, 0 neither; None
is no verdict."""
QUESTION = """Two assistants answered the same message. Say which answer is the better one: more helpful, correct, \
harmless and to the point. Neither its length nor its place counts.

<message>
{prompt}
</message>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Explain in one sentence. Then end with [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] for a tie."""
_WAITS = (1.0, 4.0, 16.0)  # seconds between one request to a server that is down and the next
_VERDICTS = {"A": 1.0, "B": -1.0, "C": 0.0}


class Pair(NamedTuple):
    """A prompt and what two models answered."""

    prompt: str
    first: str
    second: str

    def swapped(self) -> Pair:
        """With the answers in each other's places."""
        return Pair(self.prompt, self.second, self.first)


@dataclass(frozen=True)
class WinRate:
    """How often the first of two models is preferred."""

    value: float  # (wins + ties / 2) / n
    low: float  # the lower end of its 95 % interval
    high: float  # the upper end
    n: int  # pairs with two verdicts
    wins: int  # of the first model
    losses: int
    ties: int
    n_without: int  # pairs for which the judge gave fewer than two verdicts
    # Of verdicts that prefer an answer, those that prefer the one in the first place; 0.5 is no bias. None: none does
    first_place: Estimate | None


def verdict_in(reply: str) -> Verdict:
    """What a judge's reply says: its last [[A]], [[B]] or [[C]], or the letter alone; None: neither."""
    found = re.findall(r"\[\[([ABC])\]\]", reply) or re.findall(r"\A\W*([ABC])\W*\Z", reply)
    return _VERDICTS[found[-1]] if found else None


def by_url(
    url: str, model: str | None = None, key: str | None = None, seconds: float | None = 120.0
) -> tuple[Judge, str]:
    """A judge behind an OpenAI-compatible URL, which answers greedily, and its identity, for `judge_pairs`.

    Args:
        url: of the server.
        model: its name there (default: the first).
        key: that the server wants.
        seconds: that a reply may take.

    Raises:
        GroundupError: no server answers there, or it has no such model; of the judge: however often it is asked.
    """
    server, params = Remote(url, key, model, seconds), SamplingParams(temperature=0.0, max_tokens=512)

    def reply(question: str) -> str:
        return "".join(server.stream([{"role": "user", "content": question}], params, lambda n: None))

    def judge(prompt: str, first: str, second: str) -> Verdict:
        question = QUESTION.format(prompt=prompt, first=first, second=second)
        for wait in _WAITS:
            with contextlib.suppress(GroundupError):
                return verdict_in(reply(question))
            time.sleep(wait)
        return verdict_in(reply(question))

    return judge, value_digest([url, server.name, QUESTION])


def judge_pairs(
    pairs: Sequence[Pair], judge: Judge, identity: str, kept: Path, *, workers: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[tuple[Verdict, Verdict]]:  # fmt: skip
    """Show every pair to a judge, both ways.

    Args:
        pairs: what was answered; equal answers are not shown.
        judge: says which is better. What it raises ends this, after the requests that are under way.
        identity: what stands for the judge; verdicts of others in the file are left alone.
        kept: file of the verdicts.
        workers: questions at the same time.
        advance: is told how many pairs are done so far, each time that one is.

    Returns:
        For each pair the verdict with its first answer in the first place, and that with the places swapped.
    """
    lock = threading.Lock()
    known, n_done = _read(kept), 0

    def ask(pair: Pair) -> tuple[Verdict, Verdict]:
        nonlocal n_done
        verdicts = verdict_of(pair), verdict_of(pair.swapped())
        with lock:
            n_done += 1
            if advance is not None:
                advance(n_done)
        return verdicts

    def verdict_of(pair: Pair) -> Verdict:
        if pair.first == pair.second:
            return 0.0
        if (key := value_digest([identity, *pair])) not in known:
            verdict = judge(*pair)
            with lock:
                known[key] = verdict
                append_line(kept, orjson.dumps({"key": key, **pair._asdict(), "verdict": verdict}))
        return known[key]

    kept.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(ask, pairs))


def win_rate(verdicts: Sequence[tuple[Verdict, Verdict]]) -> WinRate | None:
    """The win rate that verdicts of `judge_pairs` give; None: no pair has two."""
    whole = [(one, other) for one, other in verdicts if one is not None and other is not None]
    if not whole:
        return None
    wins = sum(one > 0 > other for one, other in whole)
    losses = sum(one < 0 < other for one, other in whole)
    n, n_ties = len(whole), len(whole) - wins - losses
    value = (wins + n_ties / 2) / n
    preferring = [one > 0 for both in verdicts for one in both if one]
    place = replace(share(preferring), unit="verdicts") if preferring else None
    return WinRate(value, *wilson(value, n), n, wins, losses, n_ties, len(verdicts) - n, place)


def _read(path: Path) -> dict[str, Verdict]:
    """Verdicts that stand in a file; a line that was cut off when a process was killed is passed over."""
    found: dict[str, Verdict] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            one = orjson.loads(line)
            found[one["key"]] = None if one["verdict"] is None else float(one["verdict"])
        except (ValueError, LookupError, TypeError):
            continue
    return found
