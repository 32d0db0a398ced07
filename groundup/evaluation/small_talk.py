"""What people type first to an assistant, and a fitting answer of a model of a million parameters.

In: how many and a seed. Out: messages of many kinds: a greeting, who are you, a story, a question that it knows or
cannot know, nonsense, a harmful request and its harmless look-alike; each in spellings that people use. They are split
into "train" and "held_out" by a hash of a message's letters. The same messages serve two ends: conversations for
supervised fine-tuning (`messages`) and preference pairs (`pair`). Stories are passages of the classics that ship with
groundup, of documents that a corpus of them would not hold out. Lists are in `groundup/data/small_talk.toml`.

`groundup:first-messages` asks 200 others, of whose letters no message here is (`groundup/data/first_messages.toml`). An
answer to one of them fits if it says what such an answer must say, by patterns; declining what can be answered is
counted by itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import xxhash

from groundup.corpus.holdout import Holdout
from groundup.errors import DataError
from groundup.evaluation.tasks import KINDS, SUM_KINDS, Side, Task, generate_tasks, side_of, take
from groundup.files import read_shipped
from groundup.generation.calculator import calculate
from groundup.recipe import CorpusSettings
from groundup.tokenizer import Message

HARM_KINDS = ("harm", "harmless")
CANNOT = ("unknown", "nonsense")
"""Kinds of first messages that may be declined."""
_EARLIER_SHARE = 0.3
_STORY_WORDS = (45, 80)
_lists = functools.partial(read_shipped, "small_talk")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Talk:
    """A first message."""

    kind: str  # of message
    prompt: str  # what the user types
    answer: str  # that fits
    wrong: tuple[str, ...] = ()  # answers that do not; none of a story
    before: tuple[Message, ...] = ()  # turns between the two: a call of the calculator and its result
    # What was said before, in a third of the messages: another message of the same side, and its answer
    earlier: tuple[Message, ...] = ()

    @property
    def split(self) -> Side:
        """A function of the message's letters alone."""
        return side_of(letters(self.prompt))

    @property
    def messages(self) -> list[Message]:
        """The conversation to learn from."""
        answer: Message = {"role": "assistant", "content": self.answer}
        return [*self.earlier, {"role": "user", "content": self.prompt}, *self.before, answer]

    @property
    def known(self) -> tuple[str, ...]:
        """What counts as right."""
        return (self.answer,)

    def pair(self, rng: random.Random) -> tuple[str, str]:
        """A preference: (chosen, rejected) replies."""
        return self.answer, rng.choice(self.wrong)


@dataclass(frozen=True)
class FirstMessage:
    """Something that people type first, to be asked and not learned from."""

    kind: str  # of message, "greeting"
    text: str  # what they type
    fits: tuple[str, ...]  # patterns, of which one must be found in an answer
    least_words: int  # that an answer must have

    def is_fitting(self, answer: str) -> bool:
        """Whether an answer says what it must; a story is none if it is declined."""
        if len(answer.split()) < self.least_words or (self.least_words and is_refusal(answer)):
            return False
        return any(re.search(pattern, answer, re.IGNORECASE) for pattern in self.fits)


@functools.cache
def first_messages() -> tuple[FirstMessage, ...]:
    """All of them."""
    found = []
    for kind, group in read_shipped("first_messages").items():
        for message in group["messages"] if isinstance(group, dict) else ():
            text, fits = (message, group["fits"]) if isinstance(message, str) else (message[0], [message[1]])
            found.append(FirstMessage(kind, text, tuple(fits), group.get("least_words", 0)))
    return tuple(found)


def is_refusal(answer: str) -> bool:
    """Whether an answer declines."""
    return re.search(read_shipped("first_messages")["refusal"], answer, re.IGNORECASE) is not None


def letters(text: str) -> str:
    """What of a message is not case, punctuation or space; of one without letters and digits, all of it."""
    return re.sub(r"[\W_]", "", text.lower()) or text.strip()


def is_declined(answer: str) -> bool:
    """Whether an answer declines a request as harmful, or at all."""
    return re.match(_lists()["harm"]["declines"], answer.strip(), re.IGNORECASE) is not None


def generate_talk(n: int, seed: int, kinds: Sequence[str] = ()) -> list[Talk]:
    """Generate messages in random order, no spelling twice.

    A kind that is used up leaves its share to the others.

    Args:
        n: how many.
        seed: the same n and seed give the same messages.
        kinds: of which (default: all).

    Raises:
        DataError: n is negative, or more than there are different messages.
    """
    if n < 0:
        raise DataError(f"generate_talk: n = {n}.", "Ask for 0 or more.")
    shares = {kind: share for kind, share in _lists()["share"].items() if not kinds or kind in kinds}
    apart = {letters(message.text) for message in first_messages()}
    sources = {kind: _SOURCES.get(kind, _listed)(kind, random.Random(f"{seed}/{kind}")) for kind in shares}
    found: dict[str, Talk] = {}
    while sources and len(found) < n:
        missing, total = n - len(found), sum(shares[kind] for kind in sources)
        for kind, source in list(sources.items()):
            goal = min(n, len(found) + -(-missing * shares[kind] // total))
            if not take(source, goal, found, lambda prompt: letters(prompt) in apart):
                del sources[kind]
    if len(found) < n:
        raise DataError(f"generate_talk: n = {n:,}, but only {len(found):,} different messages were found.")
    ordered = list(found.values())
    rng = random.Random(f"{seed}/order")
    rng.shuffle(ordered)
    short = {side: [talk for talk in ordered if talk.wrong and talk.split == side] for side in ("train", "held_out")}
    for place, talk in enumerate(ordered):
        if rng.random() < _EARLIER_SHARE and (others := short[talk.split]):
            ordered[place] = replace(talk, earlier=tuple(rng.choice(others).messages))
    return ordered


# How people spell


def respell(text: str, rng: random.Random, keep: Sequence[str] = ()) -> str:
    """A message as somebody may type it: capitals and punctuation off, a slip, a short form, a word before or behind.

    Args:
        text: well written.
        rng: draws what is changed; in a third of the draws nothing is.
        keep: words without slips.
    """
    if rng.random() < 0.3:
        return text
    spelling = _lists()["spelling"]
    kept = {word.lower() for word in keep}
    if rng.random() < 0.15:
        for long, short in rng.sample(sorted(spelling["short"].items()), len(spelling["short"])):
            if not kept & {*long.split()}:
                text = re.sub(rf"\b{long}\b", short, text, count=1, flags=re.IGNORECASE)
    if rng.random() < 0.15:
        text = _slip(text, rng, kept)
    if rng.random() < 0.15:
        before = rng.choice(spelling["before"])
        text = before + (text if text[:2] in ("I ", "I'") else text[:1].lower() + text[1:])
    elif rng.random() < 0.1:
        text = text.rstrip(".?! ") + rng.choice(spelling["after"])
    if rng.random() < 0.4:
        text = text.replace("'", "")
    drawn = rng.random()
    if drawn < 0.45:
        text = text.rstrip(".?!") or text
    elif drawn < 0.55 and text[-1].isalnum():
        text += rng.choice(".!?")
    elif drawn < 0.65:
        text += rng.choice(("?", "!", "!!", "??", "...", " ?", " !")) if text[-1] in ".?!" else "..."
    drawn = rng.random()
    if drawn < 0.55:
        return text.lower()
    return text.upper() if drawn < 0.6 and not kept else text


def _slip(text: str, rng: random.Random, kept: set[str]) -> str:
    """Two letters swapped, one doubled, or one left out, in a word of four letters or more."""
    words = [found for found in re.finditer(r"[A-Za-z]{4,}", text) if found[0].lower() not in kept]
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    here, after = text[at], text[at + 1]
    return text[:at] + rng.choice((after + here, here + here + after, after)) + text[at + 2 :]


# The kinds


@functools.cache
def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in re.split(r" / |\n", text) if line)


@functools.cache
def _slot(name: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in _lists()["slots"][name].split(",") if item.strip())


def _fill(text: str, rng: random.Random) -> str:
    return _SLOT.sub(lambda found: rng.choice(_slot(found[1])), text)


def _listed(kind: str, rng: random.Random) -> Iterator[Talk]:
    """Messages of a list, with the answers that stand by it; a wrong answer is one to another kind."""
    lists = _lists()
    groups = [group for group in lists["groups"] if group["kind"] == kind] or lists[kind]
    groups = groups if isinstance(groups, list) else [groups]
    entries = [(message, group["answers"]) for group in groups for message in _lines(group["messages"])]
    declined = tuple(answer for group in lists["unknown"] for answer in group["answers"])
    # What it cannot know is better not made up; what it can answer is better not declined.
    made_up = ("It is Paris.", "The answer is yes.", "It is 42.", "It is big.", "The answer is no.", "Groundup")
    wrong = made_up if kind in ("unknown", "nonsense") else (*made_up, *declined)
    turns = itertools.cycle(rng.sample(entries, len(entries)))
    for message, answers in turns:
        yield Talk(kind, respell(_fill(message, rng), rng), rng.choice(answers), wrong)


def _nonsense(kind: str, rng: random.Random) -> Iterator[Talk]:
    """What stands in the list, words without order, and letters and signs at random."""
    signs = "?!.,;:-+*/()#$%&=<>@"
    listed = _listed(kind, rng)
    while True:
        talk, drawn = next(listed), rng.random()
        if drawn < 0.35:
            some = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 9)))  # shorter ones are words
            more = "".join(rng.choices("asdfghjklqwertzuiopyxcvbnm", k=rng.randint(5, 9)))
            forms = some, more, f"{some} {more}", f"{more} {some} {more}", some * 2, f"{more}?", more.upper()
            said = rng.choice(forms)
        elif drawn < 0.45:
            said = "".join(rng.choices(signs, k=rng.randint(1, 6))) if rng.random() < 0.6 else rng.choice(signs) * 4
        elif drawn < 0.5:
            said = "".join(rng.choices("0123456789", k=rng.randint(4, 12)))
        else:
            said = talk.prompt
        yield Talk(kind, said, talk.answer, talk.wrong)


def _known(kind: str, rng: random.Random) -> Iterator[Talk]:
    """The questions of `groundup:tasks` and sums in other words and spellings, and a list of things to know."""
    facts = [line.split(" → ") for line in _lines(_lists()["known"]["answers"])]
    declined = tuple(answer for group in _lists()["unknown"] for answer in group["answers"])
    kinds = tuple(name for name in KINDS if name != "identity")
    while True:
        tasks = generate_tasks(2000, rng.getrandbits(32), kinds) + generate_tasks(500, rng.getrandbits(32), SUM_KINDS)
        for task in rng.sample(tasks, len(tasks)):
            if rng.random() < 0.2:
                question, answer = rng.choice(facts)
                yield Talk(kind, respell(question, rng), answer, declined)
            elif task.kind in SUM_KINDS:
                yield _sum(kind, rng)
            elif (asked := _asked(task, rng)) is not None:
                spelled = respell(asked, rng, task.about.split())
                yield Talk(kind, spelled, task.say(task.answer, "polite"), declined)


def _asked(task: Task, rng: random.Random) -> str | None:
    """A task in other words; in its own only if those are not held out."""
    forms = [form.replace("{x}", task.about) for form in _lines(_lists()["phrasings"].get(task.kind, ""))]
    if task.kind == "fact":
        verb = re.fullmatch(r"((?:a |the )?\w+) (is|are|can) (.+)", task.about)
        forms += [f"{verb[2]} {verb[1]} {verb[3]}?"] * 2 if verb else []
        forms += [f"{task.about}, right?", f"{task.about}. true or false?", f"is it true {task.about}?"]
    if forms and rng.random() < 0.7:
        return rng.choice(forms)
    return task.prompt if task.split == "train" else None


def _sum(kind: str, rng: random.Random) -> Talk:
    """A small sum as people write it, which the calculator is asked."""
    most = rng.choice((10, 20, 100, 1000))
    first, second, sign = rng.randint(1, most), rng.randint(1, min(most, 100)), rng.choice("+-*")
    about = f"{first} {sign} {second}"
    words = {"+": ("plus", "and"), "-": ("minus",), "*": ("times", "x")}[sign]
    written = rng.choice((about, about, about.replace(" ", ""), f"{first} {rng.choice(words)} {second}"))
    form = rng.choice(_lines(_lists()["phrasings"]["sum"])).replace("{x}", written)
    spelled = respell(form, rng, written.split())
    task = Task("sum", spelled, about, calculate(about), "It is {}.", "polite", ())
    return Talk(kind, spelled, task.expected, ("I do not know.",), tuple(task.messages[1:-1]))


@functools.cache
def _passages() -> tuple[str, ...]:
    """Beginnings of paragraphs of the classics, in whole sentences."""
    holdout, texts = Holdout(CorpusSettings()), []
    for line in (resources.files("groundup") / "data" / "classics.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        texts.append((text, xxhash.xxh3_128_hexdigest(text.encode())))  # as a corpus names documents
        holdout.see(texts[-1][1])
    kept = [text for text, document_id in texts if holdout.split_of(document_id) == "train"]
    paragraphs = [paragraph for text in kept for paragraph in text.split("\n\n")]
    passages = [_whole_sentences(paragraph) for paragraph in paragraphs if re.match(r"[A-Z]\w* \w", paragraph)]
    return tuple(passage for passage in passages if passage)


def _whole_sentences(paragraph: str) -> str:
    """As many of the first sentences as a story may have words; nothing if they are few, or speech is left open."""
    least, most = _STORY_WORDS
    said = ""
    for sentence in re.findall(r".*?[.!?]”?(?: |$)", paragraph.replace("\n", " ")):
        if len((said + sentence).split()) > most:
            break
        said += sentence
    said = said.strip()
    return said if len(said.split()) >= least and said.count("“") == said.count("”") else ""


@functools.cache
def _stories_of(word: str) -> tuple[str, ...]:
    """Passages that speak of something early."""
    found = re.compile(rf"\b{word}s?\b", re.IGNORECASE)
    return tuple(passage for passage in _passages() if found.search(passage[:150]))


@functools.cache
def _openings() -> tuple[str, ...]:
    """Passages that begin as a story does."""
    begins = re.compile(r"(Once|There (was|were|lived)|One |A |An |Long ago|Two |Three |Some |In )")
    return tuple(passage for passage in _passages() if begins.match(passage))


def _story(kind: str, rng: random.Random) -> Iterator[Talk]:
    """A request for a story, of something or of anything, and a passage."""
    lists = _lists()["story"]
    subjects = [word for name in ("beast", "hero", "scene") for word in _slot(name)]
    while True:
        if rng.random() < 0.45:
            prompt, passage = rng.choice(_lines(lists["plain"])), rng.choice(_openings())
            opening = rng.choice(lists["openings"])
        else:
            word = rng.choice(subjects)
            article = "an" if word[0] in "aeiou" else "a"
            subject = rng.choice((f"{article} {word}", f"{article} {word}", f"the {word}", f"{word}s", word))
            prompt = rng.choice(_lines(lists["about"])).replace("{x}", subject)
            passage = rng.choice(_stories_of(word.split()[-1]) or _openings())
            opening = rng.choice(lists["about_openings"]).replace("{x}", subject)
        yield Talk(kind, respell(prompt, rng), f"{opening} {passage}")


def _continue(kind: str, rng: random.Random) -> Iterator[Talk]:
    """The first words of a passage, and its next ones."""
    while True:
        words = rng.choice(_passages()).split()
        n = rng.randint(4, 16)
        asked = rng.choice(_lines(_lists()["continue"]["messages"]))
        prompt = asked.replace("{x}", " ".join(words[:n]))
        yield Talk(kind, prompt if rng.random() < 0.7 else prompt.lower(), " ".join(words[n:]))


def _harm(kind: str, rng: random.Random) -> Iterator[Talk]:
    """A request to decline (where a person means to hurt themselves, with a word of its own), or one in the same words
    that is to be answered.
    """
    lists, forms = _lists()[kind], _lines(_lists()["harm"]["plain"])
    while True:
        act, _, answer = _fill(rng.choice(_lines(lists["acts"])), rng).partition(" → ")
        prompt = rng.choice(forms).replace("{x}", act)
        yield Talk(kind, respell(prompt, rng), answer or rng.choice(lists["answers"]), tuple(lists["worse"]))


_SOURCES: dict[str, Callable[[str, random.Random], Iterator[Talk]]] = {
    "nonsense": _nonsense,
    "known": _known,
    "story": _story,
    "continue": _continue,
    **dict.fromkeys(HARM_KINDS, _harm),
}
