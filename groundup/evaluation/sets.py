"""The generated sets that a recipe names: short questions, and first messages.

`groundup:tasks` has twelve kinds of questions; `groundup:hard-tasks` three that need more than a few hundred examples;
`groundup:sums` are answered with a calculator (`tasks.py`). `groundup:talk` is what people type first, `groundup:harm`
those of its requests that are harmful or only look so (`small_talk.py`).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence

from groundup.errors import DataError
from groundup.evaluation.small_talk import HARM_KINDS, Talk, generate_talk
from groundup.evaluation.tasks import HARD_KINDS, KINDS, SUM_KINDS, Task, generate_tasks

SETS: dict[str, Callable[[int, int], Sequence[Task | Talk]]] = {
    "groundup:tasks": functools.partial(generate_tasks, kinds=KINDS),
    "groundup:hard-tasks": functools.partial(generate_tasks, kinds=HARD_KINDS),
    "groundup:sums": functools.partial(generate_tasks, kinds=SUM_KINDS),
    "groundup:talk": generate_talk,
    "groundup:harm": functools.partial(generate_talk, kinds=HARM_KINDS),
}
"""By name: n and a seed to so many of it."""


def fewer(names: Sequence[str], most: int) -> tuple[str, ...]:
    """The same names, with so many at most where one says how many."""
    parts = [(name, *name.rpartition(":")) for name in names]
    return tuple(
        f"{head}:{min(int(count), most)}" if head in SETS and count.isdecimal() else name
        for name, head, _, count in parts
    )


def read_set(name: str, n: int, seed: int) -> Sequence[Task | Talk]:
    """A set, `groundup:tasks`, or so many of it, `groundup:sums:500`.

    Args:
        name: as a recipe says it.
        n: how many, where the name does not say.
        seed: of the generator.

    Raises:
        DataError: no such set, or no such number.
    """
    prefix, _, rest = name.partition(":")
    kind, _, count = rest.partition(":")
    made = SETS.get(f"{prefix}:{kind}")
    if made is None or (count and not (count.isdecimal() and len(count) <= 6)):
        near = difflib.get_close_matches(name, SETS, n=1)
        known = f"There are: {', '.join(SETS)}; behind it how many, at most 999,999: :500."
        fix = f"Did you mean {near[0]!r}?" if near else known
        raise DataError(f"{name!r} is no set of tasks.", fix)
    return made(int(count) if count else n, seed)
