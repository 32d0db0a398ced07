"""First messages and their answers: sides, spellings, kinds, the held-out list, preferences and what is scored."""

from __future__ import annotations

import functools
import random
import re
from collections import Counter

import pytest

from groundup.alignment.conversations import load_conversations
from groundup.alignment.preferences import load_preferences
from groundup.alignment.rewards import load_prompts
from groundup.corpus.holdout import Holdout
from groundup.errors import DataError
from groundup.evaluation import small_talk
from groundup.evaluation.benchmarks import Item, Reply
from groundup.evaluation.measure import figures_of
from groundup.evaluation.sets import SETS, GeneratedSet, fewer, read_set
from groundup.evaluation.small_talk import Talk, first_messages, generate_talk, is_declined, letters, respell
from groundup.generation.calculator import calculate, read_call
from groundup.recipe import EvaluateSettings
from groundup.tokenizer import Tokenizer, render

N = 3000
KINDS = (
    "greeting", "mood", "who", "what", "made", "can", "help", "thanks", "goodbye", "chat", "story", "continue", "known",
    "unknown", "nonsense", "harm", "harmless",
)  # fmt: skip


@functools.cache
def talks() -> tuple[Talk, ...]:
    return tuple(generate_talk(N, seed=1))


def of(kind: str) -> list[Talk]:
    return [talk for talk in talks() if talk.kind == kind]


def test_every_kind_is_there_and_no_spelling_twice() -> None:
    counts = Counter(talk.kind for talk in talks())
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 40
    assert counts["story"] > 150
    assert counts["unknown"] > 300
    assert len({talk.prompt for talk in talks()}) == N
    assert all(talk.prompt.strip() and talk.answer.strip() for talk in talks())


def test_the_seed_decides_everything() -> None:
    assert generate_talk(300, seed=5) == generate_talk(300, seed=5) != generate_talk(300, seed=6)


def test_a_message_and_its_spellings_are_on_one_side_and_so_is_what_was_said_before() -> None:
    sides = Counter(talk.split for talk in talks())
    assert 0.06 * N < sides["held_out"] < 0.14 * N
    by_letters: dict[str, set[str]] = {}
    for talk in talks():
        by_letters.setdefault(letters(talk.prompt), set()).add(talk.split)
    assert all(len(sides) == 1 for sides in by_letters.values())
    earlier = [talk for talk in talks() if talk.earlier]
    assert 0.2 * N < len(earlier) < 0.4 * N
    for talk in earlier:
        assert [talk.earlier[0]["role"], talk.earlier[-1]["role"]] == ["user", "assistant"]
        assert Talk("", talk.earlier[0]["content"], "").split == talk.split
        assert talk.messages[len(talk.earlier)] == {"role": "user", "content": talk.prompt}


def test_no_held_out_first_message_is_learned() -> None:
    apart = {letters(message.text) for message in first_messages()}
    assert len(apart) > 150
    found = load_conversations(["groundup:talk"], N, 2, "align.sft")
    said = {letters(turn["content"]) for one in found.train + found.held_out for turn in one if turn["role"] == "user"}
    assert len(said) > 1500
    assert not said & apart


def test_stories_are_passages_of_the_training_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = small_talk._passages.__wrapped__()
    assert len(kept) > 800
    monkeypatch.setattr(Holdout, "split_of", lambda self, name: "train")
    assert len(small_talk._passages.__wrapped__()) > len(kept) + 50
    for talk in of("story"):
        passage = next(text for text in kept if talk.answer.endswith(text))
        assert 45 <= len(passage.split()) <= 80
        assert passage[-1] in ".!?”"
        assert passage.count("“") == passage.count("”")
        assert not talk.wrong
    for talk in of("continue"):
        start = talk.prompt.partition(": ")[2] or talk.prompt.partition("? ")[2]
        whole = re.sub(r"\s*\.\.\.$", "", start).lower() + " " + talk.answer.lower()
        assert any(text.lower() == whole for text in kept)


def test_a_story_is_about_what_was_asked() -> None:
    asked = [talk for talk in of("story") if "dog" in talk.prompt.lower()]
    assert asked
    assert all("dog" in talk.answer.lower() for talk in asked)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("unknown", "nonsense", "harm")])
def test_what_it_can_answer_is_not_declined(kind: str) -> None:
    assert [talk.answer for talk in of(kind) if is_declined(talk.answer)] == []


@pytest.mark.parametrize("kind", ["unknown", "nonsense", "harm"])
def test_what_it_cannot_or_should_not_do_it_says(kind: str) -> None:
    assert all(is_declined(talk.answer) for talk in of(kind))
    assert not any(is_declined(answer) for talk in of(kind) for answer in talk.wrong)


def test_sums_are_given_to_the_calculator() -> None:
    sums = [talk for talk in of("known") if talk.before]
    assert len(sums) > 10
    for talk in sums:
        call, result = talk.before
        expression = read_call(call["content"])
        assert expression is not None
        assert result == {"role": "tool", "content": calculate(expression)}
        assert talk.answer == f"It is {result['content']}."


def test_people_spell_as_they_like() -> None:
    rng = random.Random(1)
    spelled = {respell("What is your name?", rng) for _ in range(400)}
    assert {"What is your name?", "what is your name", "what is your name?"} <= spelled
    assert any("??" in text for text in spelled)
    assert any("whats" in text for text in spelled)
    assert any("please" in text or "pls" in text for text in spelled)
    assert any(
        sorted(letters(text)) == sorted("whatisyourname") and letters(text) != "whatisyourname" for text in spelled
    )
    assert all("mnrwq" in respell("opposite of mnrwq?", rng, ["mnrwq"]) for _ in range(300))


def test_words_that_are_asked_about_have_no_slips() -> None:
    for talk in of("known"):
        if talk.prompt.lower().startswith(("repeat", "say")) and talk.answer.startswith("You said"):
            assert talk.answer.removeprefix("You said ").rstrip(".").lower() in talk.prompt.lower()


def test_answers_are_plain_text_of_few_tokens() -> None:
    tokenizer = Tokenizer.train(small_talk._passages(), vocab_size=2048)
    unusual = Counter(letter for talk in talks() for letter in talk.answer if talk.wrong and not letter.isascii())
    assert not unusual
    lengths = [len(render(tokenizer, talk.messages).ids) for talk in talks()]
    assert max(lengths) < 256
    words = sum(len(talk.answer.split()) for talk in talks())
    assert sum(len(tokenizer.encode(talk.answer)) for talk in talks()) < 1.9 * words


def test_preferences_of_help_and_harm() -> None:
    for kind, chosen in (("harm", True), ("harmless", False)):
        pairs = [talk.pair(random.Random(1)) for talk in of(kind)]
        assert {(is_declined(better), is_declined(worse)) for better, worse in pairs} == {(chosen, not chosen)}
    found = load_preferences(["groundup:talk"], "align.dpo", n_tasks=1000)
    assert 700 < len(found.train) < 900  # without stories and continuations
    assert {len(one.answers) for one in found.train} == {2}


def test_prompts_are_first_messages_and_their_answers_are_known() -> None:
    tokenizer = Tokenizer.train(["a small talk"] * 9, vocab_size=300)
    found = load_prompts(["groundup:talk:200"], 0, 1, tokenizer, 10_000, "align.ppo")
    known = {talk.prompt: talk.known for talk in generate_talk(200, 1)}
    assert {one.messages[0]["content"]: one.known for one in found.train + found.held_out} == known


def test_sets_by_name() -> None:
    assert {talk.kind for talk in read_set("groundup:harm:300", 10, 1)} == {"harm", "harmless"}
    assert len(read_set("groundup:talk", 50, 1)) == 50
    with pytest.raises(DataError, match="Did you mean 'groundup:talk'"):
        read_set("groundup:tlak", 1, 1)
    assert all(len(made(20, 1)) == 20 for made in SETS.values())


def test_more_than_there_are_and_fewer_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_talk, "respell", lambda text, *_: text)
    assert {talk.kind for talk in generate_talk(100, 1, ["mood", "made", "help"])} >= {"mood", "made", "help"}
    with pytest.raises(DataError, match="but only"):
        generate_talk(2000, 1, ["mood", "made"])
    with pytest.raises(DataError, match="0 or more"):
        generate_talk(-1, 1)


def test_harm_and_look_alikes_are_scored() -> None:
    asked = [*of("harm")[:4], *of("harmless")[:4]]
    texts = [asked[0].answer, *["Take it."] * 3, asked[4].answer, "Take it.", "No, I will not.", "I do not know."]
    harm, settings = GeneratedSet("groundup:harm"), EvaluateSettings()
    outcomes = [
        harm.grade(Item(0, talk.kind, talk.prompt, row={"asked": talk}), [Reply(text)], settings)["outcomes"]
        for talk, text in zip(asked, texts, strict=True)
    ]
    rights = [True, False, False, False, True, True, False, False]
    assert outcomes == [
        {"harm_declined_share" if talk.kind == "harm" else "harmless_answered_share": right}
        for talk, right in zip(asked, rights, strict=True)
    ]
    figures = figures_of([{"outcomes": one} for one in outcomes])
    assert (figures["harm_declined_share"].value, figures["harmless_answered_share"].value) == (0.25, 0.5)


def test_a_quick_run_has_fewer() -> None:
    assert fewer(["groundup:talk:5000", "groundup:tasks", "groundup:sums:30", "my:9.jsonl"], 40) == (
        "groundup:talk:40", "groundup:tasks", "groundup:sums:30", "my:9.jsonl",
    )  # fmt: skip
