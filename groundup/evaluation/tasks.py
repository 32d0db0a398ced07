"""Short questions with answers that a program can check, for a model of a million parameters.

In: how many and a seed. Out: tasks of several kinds, evenly spread, each prompt once, split into "train" and
"held_out" by a hash of the prompt. The same tasks serve three ends: conversations for supervised fine-tuning
(`messages`), preference pairs (`pair`), and a reward of 0 or 1 for reinforcement learning (`verify`). Lists and
phrasings are in `groundup/data/tasks.toml`.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from groundup.errors import DataError
from groundup.files import read_shipped
from groundup.generation.calculator import calculate, write_call
from groundup.tokenizer import Message

KINDS = (
    "opposite", "capital", "upper_case", "fact", "identity",
    "larger", "sort_digits", "reverse_digits", "count_words", "first_word", "last_word", "repeat",
)  # fmt: skip
"""The first five draw on closed lists, where a held-out fact is always learned under other phrasings."""

CLOSED_KINDS = KINDS[:5]
HARD_KINDS = ("sort_five", "reverse_five", "count_letters")
SUM_KINDS = ("sum",)

_HELD_OUT_ONE_IN = 10
_PHRASINGS_PER_FACT = 4  # at least so many, so that a fact is seen often enough to be learned
_MOST_REPEATS = 1000  # draws in a row without a new prompt, before a kind counts as used up

Style = Literal["plain", "polite"]
Side = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True)
class Task:
    """One question."""

    kind: str  # one of `KINDS`
    prompt: str  # what the user says
    about: str  # what is asked about, such as the country, the digits or the words; phrasings of one fact share it
    answer: str  # the right answer, in the plain style ("82")
    form: str  # the polite style, with {} for the answer ("It is {}.")
    style: Style  # which of the two the conversation shows; drawn by lot, nothing in the prompt tells
    wrong: tuple[str, ...]  # plausible wrong answers, plain

    @property
    def split(self) -> Side:
        """A function of the prompt alone."""
        return side_of(self.prompt)

    @property
    def expected(self) -> str:
        """The right answer in the task's style."""
        return self.say(self.answer, self.style)

    @property
    def messages(self) -> list[Message]:
        """The conversation to learn from; a sum is given to the calculator first."""
        said: list[Message] = [{"role": "user", "content": self.prompt}]
        if self.kind in SUM_KINDS:
            said += [{"role": "assistant", "content": write_call(self.about)}, {"role": "tool", "content": self.answer}]
        return [*said, {"role": "assistant", "content": self.expected}]

    @property
    def known(self) -> tuple[str, ...]:
        """The right answer in either style."""
        return self.say(self.answer, "plain"), self.say(self.answer, "polite")

    def say(self, answer: str, style: Style) -> str:
        """An answer in a style."""
        return self.form.format(answer) if style == "polite" else answer

    def is_polite(self, answer: str) -> bool:
        """Whether an answer is in the polite style, right or not."""
        before, _, after = self.form.partition("{}")
        said = answer.strip()
        return said.startswith(before) and said.endswith(after) and len(said) > len(before) + len(after)

    def pair(self, rng: random.Random) -> tuple[str, str]:
        """A preference: (chosen, rejected) replies.

        Chosen is right and polite. Rejected is right but plain (half of the draws), wrong but polite
        (three in ten), or both wrong and plain (two in ten).
        """
        flaw = rng.choices(("style", "answer", "both"), weights=(5, 3, 2))[0]
        answer = self.answer if flaw == "style" else rng.choice(self.wrong)
        return self.say(self.answer, "polite"), self.say(answer, "polite" if flaw == "answer" else "plain")


def side_of(text: str) -> Side:
    """The side of the split on which questions with this text are: one in ten is held out."""
    return "train" if xxhash.xxh3_64_intdigest(text.encode()) % _HELD_OUT_ONE_IN else "held_out"


def verify(task: Task, reply: str) -> bool:
    """Whether a reply is exactly the right answer, in either style; white space around it is ignored."""
    return reply.strip() in task.known


def generate_tasks(n: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Task]:
    """Generate tasks in random order, about as many of each kind, no prompt twice.

    A closed list that is used up leaves its share to the kinds after it.

    Args:
        n: how many.
        seed: the same n and seed give the same tasks.
        kinds: of which.

    Raises:
        DataError: n is negative, or more than there are different prompts.
    """
    if n < 0:
        raise DataError(f"generate_tasks: n = {n}.", "Ask for 0 or more.")
    tasks: dict[str, Task] = {}
    for place, kind in enumerate(kinds):
        share = -(-(n - len(tasks)) // (len(kinds) - place))
        rng = random.Random(f"{seed}/{kind}")
        source = _closed(kind, share, rng) if kind in CLOSED_KINDS else _open(kind, rng)
        take(source, len(tasks) + share, tasks)
    if len(tasks) < n:
        raise DataError(f"generate_tasks: n = {n:,}, but only {len(tasks):,} different prompts were found.")
    ordered = list(tasks.values())
    random.Random(f"{seed}/order").shuffle(ordered)
    return ordered


def take(source: Iterator[Any], goal: int, found: dict[str, Any], refused: Callable[[str], bool] | None = None) -> bool:
    """Add questions with new prompts, until there are `goal` in all; whether there were so many."""
    repeats = 0
    while len(found) < goal and repeats < _MOST_REPEATS and (one := next(source, None)) is not None:
        is_new = one.prompt not in found and not (refused and refused(one.prompt))
        repeats = 0 if is_new else repeats + 1
        if is_new:
            found[one.prompt] = one
    return len(found) >= goal


_Fact = tuple[str, tuple[str, ...], str, str, tuple[str, ...]]  # about, prompts, answer, form, wrong
_Draw = tuple[str, str, str, tuple[str, ...]]  # the same without prompts


def _closed(kind: str, share: int, rng: random.Random) -> Iterator[Task]:
    """Tasks about a closed list's facts, in turn, each fact's first prompt on the train side.

    With a small share only some facts are used, so that each is met under several phrasings.
    """
    facts = _facts(kind)
    rng.shuffle(facts)
    columns = []
    for about, prompts, answer, form, wrong in facts[: max(1, share // _PHRASINGS_PER_FACT)]:
        column = [_task(kind, prompt, (about, answer, form, wrong), rng) for prompt in prompts]
        rng.shuffle(column)
        first = next(place for place, task in enumerate(column) if task.split == "train")
        column[0], column[first] = column[first], column[0]
        columns.append(column)
    for row in itertools.zip_longest(*columns):
        yield from (task for task in row if task is not None)


def _open(kind: str, rng: random.Random) -> Iterator[Task]:
    """Endless tasks, each drawn anew."""
    phrasings = read_shipped("tasks")["phrasings"][kind]
    while True:
        drawn = _drawn(kind, rng)
        yield _task(kind, rng.choice(phrasings).format(x=drawn[0]), drawn, rng)


def _task(kind: str, prompt: str, asked: _Draw, rng: random.Random) -> Task:
    about, answer, form, wrong = asked
    style: Style = "polite" if rng.random() < 0.5 else "plain"
    return Task(kind, prompt, about, answer, form, style, wrong)


@functools.cache
def _words() -> tuple[str, ...]:
    return tuple(read_shipped("tasks")["words"].split())


def _facts(kind: str) -> list[_Fact]:
    """What a closed list asks, with all there is to answer."""
    lists, form = read_shipped("tasks"), "It is {}."
    entries: list[tuple[str, str, tuple[str, ...]]]  # about, answer, wrong
    if kind == "identity":
        openings = lists["identity"]["openings"]
        return [
            (
                question,
                tuple(opening + (question if opening else question[0].upper() + question[1:]) for opening in openings),
                group["answer"],
                group["polite"],
                tuple(group["wrong"]),
            )
            for group in lists["identity"]["groups"]
            for question in group["questions"]
        ]
    if kind == "fact":
        form = "The answer is {}."
        sides = (("yes", "no"), ("no", "yes"))
        entries = [(statement, answer, (wrong,)) for answer, wrong in sides for statement in lists["facts"][answer]]
    elif kind == "capital":
        cities = list(lists["capitals"].values())
        entries = [(*pair, _others(cities, place)) for place, pair in enumerate(lists["capitals"].items())]
    elif kind == "opposite":
        pairs = [pair.split() for pair in lists["opposites"]["pairs"].split(",")]
        both = [(a, b) for left, right in pairs for a, b in ((left, right), (right, left))]
        answers = [answer for _, answer in both]
        # The word asked about is the likeliest wrong answer.
        entries = [(a, b, (a, *_others(answers, place)[1:])) for place, (a, b) in enumerate(both)]
    else:
        words = lists["short_words"].split()
        upper = [word.upper() for word in words]
        entries = [(word, upper[n], (word, word.capitalize(), *_others(upper, n))) for n, word in enumerate(words)]
    phrasings = lists["phrasings"][kind]
    return [(about, tuple(one.format(x=about) for one in phrasings), answer, form, wrong)
            for about, answer, wrong in entries]  # fmt: skip


def _others(answers: Sequence[str], place: int) -> tuple[str, ...]:
    """Three other answers of a list, as wrong ones."""
    following = [answers[(place + step) % len(answers)] for step in range(1, len(answers))]
    return tuple(answer for answer in following if answer != answers[place])[:3]


def _drawn(kind: str, rng: random.Random) -> _Draw:
    """A question of an open kind."""
    form = "It is {}."
    if kind == "larger":
        first, second = rng.sample(range(1, 100), 2)
        return f"{first} or {second}", str(max(first, second)), form, (str(min(first, second)),)
    if kind == "sum":  # too large to be learned by heart
        first, second, sign = rng.randint(10, 999), rng.randint(2, 99), rng.choice("+-*")
        about = f"{first} {sign} {second}"
        value = int(calculate(about))
        return about, str(value), form, (str(value + 1), str(value - 10), str(value + 100))
    if kind.startswith(("sort", "reverse")):
        n = 5 if kind.endswith("five") else 3
        digits = "0"
        while len(set(digits)) == 1:
            digits = "".join(rng.choices("0123456789", k=n))
        answer = "".join(sorted(digits)) if kind.startswith("sort") else digits[::-1]
        orders = {"".join(order) for order in itertools.islice(itertools.permutations(digits), 24)} - {answer}
        return digits, answer, form, tuple(sorted(orders))
    if kind == "count_letters":
        words = rng.sample(_words(), 2)
        letter = rng.choice(sorted({*"".join(words)}))
        count = "".join(words).count(letter)
        return f"{letter} in {' '.join(words)}", str(count), "It is there {} times.", (str(count - 1), str(count + 1))
    count = rng.randint(2, {"count_words": 7, "repeat": 3}.get(kind, 4))
    words = rng.sample(_words(), count)
    said = " ".join(words)
    if kind == "count_words":
        return said, str(count), "There are {} words.", (str(count - 1), str(count + 1))
    if kind == "repeat":
        return said, said, "You said {}.", (" ".join(reversed(words)), " ".join(words[1:]), " ".join(words[:-1]))
    right = 0 if kind == "first_word" else count - 1
    return said, words[right], form, (*words[:right], *words[right + 1 :])
