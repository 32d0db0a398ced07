"""Short questions with answers that a program can check, for a model of a million parameters.

In: how many and a seed. Out: tasks of several kinds, evenly spread, each prompt once, split into "train" and
"held_out" by a hash of the prompt. The same tasks serve three ends: conversations for supervised fine-tuning
(`messages`), preference pairs (`pair`), and a reward of 0 or 1 for reinforcement learning (`reward`). Lists and
phrasings are in `groundup/data/tasks.toml`.
"""

from __future__ import annotations

import functools
import itertools
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import xxhash

from groundup.errors import DataError
from groundup.generation.calculator import calculate, write_call
from groundup.tokenizer import Message

KINDS = (
    "opposite",
    "capital",
    "upper_case",
    "fact",
    "identity",
    "larger",
    "sort_digits",
    "reverse_digits",
    "count_words",
    "first_word",
    "last_word",
    "repeat",
)
"""The first five draw on closed lists, where a held-out fact is always learned under other phrasings."""

CLOSED_KINDS = KINDS[:5]
HARD_KINDS = ("sort_five", "reverse_five", "count_letters")
SUM_KINDS = ("sum",)

_HELD_OUT_ONE_IN = 10
_PHRASINGS_PER_FACT = 4  # at least so many, so that a fact is seen often enough to be learned
_MOST_REPEATS = 1000  # draws in a row without a new prompt, before a kind counts as used up

Style = Literal["plain", "polite"]


@dataclass(frozen=True, slots=True)
class Task:
    """One question.

    Attributes:
        kind: one of `KINDS`.
        prompt: what the user says.
        about: what is asked about, such as the country, the digits or the words; phrasings of one fact share it.
        answer: the right answer, in the plain style ("82").
        form: the polite style, with {} for the answer ("It is {}.").
        style: which of the two the conversation shows; drawn by lot, nothing in the prompt tells.
        wrong: plausible wrong answers, plain.
    """

    kind: str
    prompt: str
    about: str
    answer: str
    form: str
    style: Style
    wrong: tuple[str, ...]

    @property
    def split(self) -> Literal["train", "held_out"]:
        """The side of the split; a function of the prompt alone."""
        return "held_out" if xxhash.xxh3_64_intdigest(self.prompt.encode()) % _HELD_OUT_ONE_IN == 0 else "train"

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

    def pair(self, rng: random.Random) -> tuple[str, str]:
        """A preference: (chosen, rejected) replies.

        Chosen is right and polite. Rejected is right but plain (half of the draws), wrong but polite
        (three in ten), or both wrong and plain (two in ten).
        """
        flaw = rng.choices(("style", "answer", "both"), weights=(5, 3, 2))[0]
        answer = self.answer if flaw == "style" else rng.choice(self.wrong)
        return self.say(self.answer, "polite"), self.say(answer, "polite" if flaw == "answer" else "plain")


def verify(task: Task, reply: str) -> bool:
    """Whether a reply is exactly the right answer, in either style; white space around it is ignored."""
    return reply.strip() in task.known


def reward(task: Task, reply: str) -> float:
    """1.0 for a reply that `verify` accepts, else 0.0."""
    return float(verify(task, reply))


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
        _take(source, share, tasks)
    if len(tasks) < n:
        raise DataError(f"generate_tasks: n = {n:,}, but only {len(tasks):,} different prompts were found.")
    ordered = list(tasks.values())
    random.Random(f"{seed}/order").shuffle(ordered)
    return ordered


def _take(source: Iterator[Task], share: int, tasks: dict[str, Task]) -> None:
    """Add up to `share` tasks with new prompts."""
    goal, repeats = len(tasks) + share, 0
    while len(tasks) < goal and repeats < _MOST_REPEATS:
        task = next(source, None)
        if task is None:
            return
        repeats = repeats + 1 if task.prompt in tasks else 0
        tasks.setdefault(task.prompt, task)


@dataclass(frozen=True, slots=True)
class _Fact:
    """One entry of a closed list: what is asked about, and all there is to answer."""

    about: str
    prompts: tuple[str, ...]
    answer: str
    form: str
    wrong: tuple[str, ...]


def _closed(kind: str, share: int, rng: random.Random) -> Iterator[Task]:
    """Tasks about a closed list's facts, in turn, each fact's first prompt on the train side.

    With a small share only some facts are used, so that each is met under several phrasings.
    """
    facts = _FACTS[kind]()
    rng.shuffle(facts)
    facts = facts[: max(1, share // _PHRASINGS_PER_FACT)]
    columns = []
    for fact in facts:
        column = [_task(kind, prompt, fact.about, fact.answer, fact.form, fact.wrong, rng) for prompt in fact.prompts]
        rng.shuffle(column)
        first = next(place for place, task in enumerate(column) if task.split == "train")
        column[0], column[first] = column[first], column[0]
        columns.append(column)
    for row in itertools.zip_longest(*columns):
        yield from (task for task in row if task is not None)


def _open(kind: str, rng: random.Random) -> Iterator[Task]:
    """Endless tasks, each drawn anew."""
    phrasings = _lists()["phrasings"][kind]
    while True:
        about, answer, form, wrong = _DRAWS[kind](rng)
        yield _task(kind, rng.choice(phrasings).format(x=about), about, answer, form, wrong, rng)


def _task(
    kind: str, prompt: str, about: str, answer: str, form: str, wrong: tuple[str, ...], rng: random.Random
) -> Task:
    style: Style = "polite" if rng.random() < 0.5 else "plain"
    return Task(kind, prompt, about, answer, form, style, wrong)


@functools.cache
def _lists() -> dict[str, Any]:
    return tomllib.loads((resources.files("groundup") / "data" / "tasks.toml").read_text(encoding="utf-8"))


@functools.cache
def _words() -> tuple[str, ...]:
    return tuple(_lists()["words"].split())


def _asked(kind: str, about: str) -> tuple[str, ...]:
    return tuple(phrasing.format(x=about) for phrasing in _lists()["phrasings"][kind])


def _others(answers: Sequence[str], place: int) -> tuple[str, ...]:
    """Three other answers of a list, as wrong ones."""
    following = [answers[(place + step) % len(answers)] for step in range(1, len(answers))]
    return tuple(answer for answer in following if answer != answers[place])[:3]


def _opposites() -> list[_Fact]:
    pairs = [pair.split() for pair in _lists()["opposites"]["pairs"].split(",")]
    sides = [(a, b) for left, right in pairs for a, b in ((left, right), (right, left))]
    answers = [answer for _, answer in sides]
    # The word asked about is the likeliest wrong answer.
    return [
        _Fact(word, _asked("opposite", word), answer, "It is {}.", (word, *_others(answers, place)[1:]))
        for place, (word, answer) in enumerate(sides)
    ]


def _capitals() -> list[_Fact]:
    capitals = _lists()["capitals"]
    cities = list(capitals.values())
    return [
        _Fact(country, _asked("capital", country), city, "It is {}.", _others(cities, place))
        for place, (country, city) in enumerate(capitals.items())
    ]


def _upper_case() -> list[_Fact]:
    words = _lists()["short_words"].split()
    upper = [word.upper() for word in words]
    return [
        _Fact(
            word,
            _asked("upper_case", word),
            word.upper(),
            "It is {}.",
            (word, word.capitalize(), *_others(upper, place)),
        )
        for place, word in enumerate(words)
    ]


def _facts() -> list[_Fact]:
    sides = (("yes", "no"), ("no", "yes"))
    return [
        _Fact(statement, _asked("fact", statement), answer, "The answer is {}.", (wrong,))
        for answer, wrong in sides
        for statement in _lists()["facts"][answer]
    ]


def _identity() -> list[_Fact]:
    openings = _lists()["identity"]["openings"]
    return [
        _Fact(
            question,
            tuple(opening + (question if opening else question[0].upper() + question[1:]) for opening in openings),
            group["answer"],
            group["polite"],
            tuple(group["wrong"]),
        )
        for group in _lists()["identity"]["groups"]
        for question in group["questions"]
    ]


_FACTS: dict[str, Callable[[], list[_Fact]]] = {
    "opposite": _opposites,
    "capital": _capitals,
    "upper_case": _upper_case,
    "fact": _facts,
    "identity": _identity,
}

_Draw = tuple[str, str, str, tuple[str, ...]]  # about, answer, form, wrong


def _larger(rng: random.Random) -> _Draw:
    first, second = rng.sample(range(1, 100), 2)
    return f"{first} or {second}", str(max(first, second)), "It is {}.", (str(min(first, second)),)


def _rearranged(rng: random.Random, arrange: Callable[[str], str], n: int = 3) -> _Draw:
    """So many digits, not all the same, and how they stand afterwards."""
    digits = "".join(rng.choices("0123456789", k=n))
    if len(set(digits)) == 1:
        return _rearranged(rng, arrange, n)
    answer = arrange(digits)
    orders = sorted({"".join(order) for order in itertools.islice(itertools.permutations(digits), 24)} - {answer})
    return digits, answer, "It is {}.", tuple(orders)


def _sorted(digits: str) -> str:
    return "".join(sorted(digits))


def _reversed(digits: str) -> str:
    return digits[::-1]


def _count_letters(rng: random.Random) -> _Draw:
    """How often a letter stands in two words."""
    words = " ".join(rng.sample(_words(), 2))
    letter = rng.choice(sorted({*words} - {" "}))
    count = words.count(letter)
    return f"{letter} in {words}", str(count), "It is there {} times.", (str(count - 1), str(count + 1))


def _sum(rng: random.Random) -> _Draw:
    """Two numbers and an operation, too large to be learned by heart."""
    first, second, sign = rng.randint(10, 999), rng.randint(2, 99), rng.choice("+-*")
    about = f"{first} {sign} {second}"
    value = int(calculate(about))
    return about, str(value), "It is {}.", (str(value + 1), str(value - 10), str(value + 100))


def _count_words(rng: random.Random) -> _Draw:
    count = rng.randint(2, 7)
    near = (str(count - 1), str(count + 1))
    return " ".join(rng.sample(_words(), count)), str(count), "There are {} words.", near


def _first_word(rng: random.Random) -> _Draw:
    words = rng.sample(_words(), rng.randint(2, 4))
    return " ".join(words), words[0], "It is {}.", tuple(words[1:])


def _last_word(rng: random.Random) -> _Draw:
    words = rng.sample(_words(), rng.randint(2, 4))
    return " ".join(words), words[-1], "It is {}.", tuple(words[:-1])


def _repeat(rng: random.Random) -> _Draw:
    words = rng.sample(_words(), rng.randint(2, 3))
    said = " ".join(words)
    return said, said, "You said {}.", (" ".join(reversed(words)), " ".join(words[1:]), " ".join(words[:-1]))


_DRAWS: dict[str, Callable[[random.Random], _Draw]] = {
    "larger": _larger,
    "sort_digits": functools.partial(_rearranged, arrange=_sorted),
    "reverse_digits": functools.partial(_rearranged, arrange=_reversed),
    "sort_five": functools.partial(_rearranged, arrange=_sorted, n=5),
    "reverse_five": functools.partial(_rearranged, arrange=_reversed, n=5),
    "count_letters": _count_letters,
    "sum": _sum,
    "count_words": _count_words,
    "first_word": _first_word,
    "last_word": _last_word,
    "repeat": _repeat,
}
