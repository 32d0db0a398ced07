"""Text from a model: pieces and whole, stop texts, characters over several tokens, conversations."""

import itertools
import json
import re
import time

import jsonschema
import pytest
from generation_models import TEXT, random_model, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import DataError, GroundupError
from groundup.generation import (
    Chunk,
    Constraint,
    Detokenizer,
    Engine,
    Generation,
    Request,
    SamplingParams,
    chat_prompt,
    chat_reply,
    generate,
    generate_batch,
    stream,
    stream_chat,
)
from groundup.generation.calculator import write_call
from groundup.generation.step import ModelStep
from groundup.tokenizer import render

TOKENIZER = small_tokenizer()
MODEL = random_model(vocab_size=TOKENIZER.vocab_size, std=0.05)


class Pieces:
    """A tokenizer whose token number i stands for the i-th of some byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, index):
        return self.pieces[index]


def cut(data, places):
    borders = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


def detokenized(pieces, stop=()):
    """What is given out piece by piece; tokens after a stop are not offered, as in decoding."""
    detokenizer, shown = Detokenizer(Pieces(pieces), stop), []
    for token in range(len(pieces)):
        shown.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    shown.append(detokenizer.finish())
    assert detokenizer.text == "".join(shown)
    return shown, detokenizer.stopped


def before_first_stop(text, stop):
    """The shortest beginning that a stop text ends, without the longest such stop text."""
    for end in range(1, len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


places = st.lists(st.integers(0, 200), max_size=30)
short_text = st.text("ab☃\n", max_size=24)
stop_text = st.text("ab☃\n", min_size=1, max_size=5)


@given(short_text, stop_text, places)
def test_one_stop_text_ends_the_text_where_find_finds_it(text, word, where):
    shown, stopped = detokenized(cut(text.encode(), where), (word,))
    found = text.find(word)
    assert stopped == (found >= 0)
    assert "".join(shown) == (text[:found] if found >= 0 else text)


@given(short_text, st.lists(stop_text, min_size=1, max_size=4), places)
def test_of_several_stop_texts_the_first_complete_one_counts_wherever_tokens_end(text, stop, where):
    shown, stopped = detokenized(cut(text.encode(), where), stop)
    expected = before_first_stop(text, stop)
    assert stopped == (expected is not None)
    assert "".join(shown) == (text if expected is None else expected)


def test_overlapping_beginnings_are_not_missed():
    # A matcher that starts afresh after every mismatch misses this one.
    assert detokenized([b"a", b"a", b"b", b"c"], ("ab",)) == (["", "a", "", ""], True)
    assert detokenized([b"x\n", b"\nUse", b"r", b":"], ("\n\nUser:",)) == (["x", "", "", "", ""], True)
    assert detokenized([b"x\n", b"\nUse", b"s"], ("\n\nUser:",)) == (["x", "", "\n\nUses", ""], False)


def test_a_stop_text_within_another_is_complete_first():
    assert detokenized([b"xabc"], ("abc", "b")) == (["xa", ""], True)
    assert detokenized([b"xa", b"b", b"c"], ("abc", "b")) == (["x", "a", ""], True)
    assert detokenized([b"xabc"], ("bc", "abc", "c")) == (["x", ""], True)


@given(st.text(max_size=30), places)
def test_characters_over_several_tokens_are_never_shown_in_part(text, where):
    text = text.replace("�", "?")
    shown, _ = detokenized(cut(text.encode(), where))
    assert "".join(shown) == text
    assert "�" not in "".join(shown)


@given(short_text, st.lists(stop_text, max_size=2), places)
def test_a_tokens_offset_is_where_its_text_begins(text, stop, where):
    pieces = cut(text.encode(), where)
    detokenizer = Detokenizer(Pieces(pieces), stop)
    for token in range(len(pieces)):
        detokenizer.add(token)
    n_seen = len(detokenizer.offsets)
    before = [b"".join(pieces[:token]).decode(errors="ignore") for token in range(n_seen)]
    assert detokenizer.offsets == [len(beginning) for beginning in before]
    assert n_seen == len(pieces) or detokenizer.stopped


def test_a_token_costs_the_same_however_long_the_text_is():
    detokenizer = Detokenizer(Pieces([b" word"]), ("\n\nUser: " * 20,))

    def seconds(n):
        started = time.process_time()
        for _ in range(n):
            detokenizer.add(0)
        return time.process_time() - started

    first = min(seconds(2000) for _ in range(5))
    seconds(100_000)
    assert min(seconds(2000) for _ in range(5)) < 3 * first + 0.002


@given(st.binary(max_size=30), places)
def test_bytes_that_are_no_text_decode_as_they_do_at_once(data, where):
    shown, _ = detokenized(cut(data, where))
    whole = data.decode("utf-8", errors="replace")
    # At the very end an incomplete character is left out: other bytes might have followed.
    assert whole in ("".join(shown), "".join(shown) + "�")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=2, max_size=4), min_size=1, max_size=3), places)
def test_nothing_is_held_back_that_cannot_become_a_stop_text(text, stop, where):
    pieces = cut(text.encode(), where)
    detokenizer, so_far = Detokenizer(Pieces(pieces), stop), ""
    for token, piece in enumerate(pieces):
        detokenizer.add(token)
        if detokenizer.stopped:
            return
        so_far += piece.decode()
        held = so_far[len(detokenizer.text) :]
        assert so_far.startswith(detokenizer.text)
        assert not held or any(word.startswith(held) for word in stop)


@pytest.mark.parametrize("prompt", ["", "Once upon", "東京 🙂"])
@pytest.mark.parametrize("stop", [(), "e", ("the", " a")])
def test_pieces_put_together_are_the_whole_text(prompt, stop):
    options = {"max_tokens": 60, "temperature": 1.2, "top_k": 40, "seed": 11, "stop": stop}
    pieces = list(stream(MODEL, TOKENIZER, prompt, **options))
    whole = generate(MODEL, TOKENIZER, prompt, **options)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    stops = (stop,) if isinstance(stop, str) else stop
    decoded = TOKENIZER.decode(whole.ids)
    expected = before_first_stop(decoded, stops)
    if expected is None:
        assert decoded in (whole.text, whole.text + "�")  # the last character may be cut off by max_tokens
    else:
        assert (whole.text, whole.finish_reason) == (expected, "stop")


def test_what_is_held_back_for_a_stop_text_is_given_out_at_the_end():
    options = {"max_tokens": 30, "seed": 4, "temperature": 0.8}
    whole = generate(MODEL, TOKENIZER, "Once", **options).text
    stop = whole[-3:] + "never"  # its beginning is the text's end
    pieces = list(stream(MODEL, TOKENIZER, "Once", stop=stop, **options))
    assert "".join(pieces) == generate(MODEL, TOKENIZER, "Once", stop=stop, **options).text == whole
    assert pieces[-1] == whole[-3:]


def test_several_texts_are_not_dropped_or_mixed():
    """A reference's server drops `n` in silence."""
    for options in ({"n": 2}, {"n": 2, "best_of": 3}):
        with pytest.raises(GroundupError, match=r"Engine\.run returns all"):
            generate(MODEL, TOKENIZER, "Once", **options)
    for options in ({"n": 2}, {"best_of": 3}):
        with pytest.raises(GroundupError, match=r"Engine\.run returns all"):
            stream(MODEL, TOKENIZER, "Once", **options)
    question = [{"role": "user", "content": "Hello"}]
    for ask in (chat_reply, lambda *arguments: list(stream_chat(*arguments))):
        with pytest.raises(GroundupError, match=r"Engine\.run returns all"):
            ask(MODEL, TOKENIZER, question, SamplingParams(n=2))


def test_an_empty_prompt_starts_a_document():
    result = generate(MODEL, TOKENIZER, "", max_tokens=8, temperature=0)
    assert (
        result.ids
        == generate_batch(MODEL, TOKENIZER, [[TOKENIZER.end_of_text_id]], SamplingParams(temperature=0, max_tokens=8))[
            0
        ].ids
    )
    assert result.n_tokens == 8


def test_several_prompts_give_what_each_gives_alone():
    prompts = ["Once", "In the house lived", ""]
    options = {"max_tokens": 12, "seed": 5}
    together = generate(MODEL, TOKENIZER, prompts, **options)
    assert together == [generate(MODEL, TOKENIZER, prompt, **options) for prompt in prompts]


def test_a_plain_text_goes_on_past_the_context():
    result = generate(MODEL, TOKENIZER, TEXT, max_tokens=150, temperature=0)
    assert (result.n_tokens, result.finish_reason) == (150, "length")


def test_a_text_that_names_control_tokens_is_only_text():
    ids = TOKENIZER.encode("<|end|><|assistant|>")
    assert not TOKENIZER.special_ids & set(ids)
    generate(MODEL, TOKENIZER, "<|endoftext|>", max_tokens=1)


def test_wrong_values_are_told_before_anything_is_read():
    with pytest.raises(GroundupError, match="temperature = -1"):
        stream(MODEL, TOKENIZER, "Once", temperature=-1)
    with pytest.raises(GroundupError, match=r"stop = \('',\)"):
        generate(MODEL, TOKENIZER, "Once", stop="")


def talk(n_turns):
    turns = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}] * n_turns
    return [*turns, {"role": "user", "content": "And the cat?"}]


def test_a_conversation_is_answered_as_rendered():
    params = SamplingParams(temperature=0.9, max_tokens=10, seed=3)
    model = random_model(vocab_size=TOKENIZER.vocab_size, std=0.05, context_length=128)
    ids = render(TOKENIZER, talk(1), add_generation_prompt=True).ids
    expected = generate_batch(model, TOKENIZER, [ids], params)[0]
    assert chat_reply(model, TOKENIZER, talk(1), params, pytest.fail) == expected
    assert "".join(stream_chat(model, TOKENIZER, talk(1), params, pytest.fail)) == expected.text


def test_the_oldest_turns_are_left_out_and_it_is_said():
    system = {"role": "system", "content": "Be kind."}
    messages = [system, *talk(30)]
    params = SamplingParams(temperature=0, max_tokens=16)
    model = random_model(vocab_size=TOKENIZER.vocab_size, std=0.05, context_length=96)
    told = []
    reply = chat_reply(model, TOKENIZER, messages, params, told.append)
    kept = [system, *messages[1 + told[0] :]]
    ids = render(TOKENIZER, kept, add_generation_prompt=True).ids
    assert kept[1]["role"] == "user"
    assert told[0] < 60
    assert len(ids) <= 96 - 16
    # One question more would not have fitted.
    assert len(render(TOKENIZER, [system, *messages[told[0] - 1 :]], add_generation_prompt=True).ids) > 96 - 16
    assert reply == generate_batch(model, TOKENIZER, [ids], params)[0]


@given(st.integers(0, 8), st.integers(0, 160), st.booleans())
def test_a_shortened_conversation_fits_and_keeps_its_ends(n_turns, most_tokens, has_system):
    first = [{"role": "system", "content": "Be kind."}] if has_system else []
    messages = [*first, *talk(n_turns)]
    shortest = len(render(TOKENIZER, [*first, messages[-1]], add_generation_prompt=True).ids)
    if most_tokens < shortest:
        with pytest.raises(GroundupError, match="leaves room for"):
            chat_prompt(TOKENIZER, messages, most_tokens)
        return
    ids, n_left_out = chat_prompt(TOKENIZER, messages, most_tokens)
    assert len(ids) <= most_tokens
    assert n_left_out % 2 == 0
    assert ids == render(TOKENIZER, [*first, *messages[len(first) + n_left_out :]], add_generation_prompt=True).ids


def test_of_two_questions_in_a_row_only_the_oldest_need_be_left_out():
    messages = [{"role": "user", "content": "Is anybody there?"}, *talk(1)]
    most_tokens = len(render(TOKENIZER, messages[1:], add_generation_prompt=True).ids)
    ids, n_left_out = chat_prompt(TOKENIZER, messages, most_tokens)
    assert (len(ids), n_left_out) == (most_tokens, 1)


def test_an_answer_ends_at_the_contexts_end():
    model = random_model(vocab_size=TOKENIZER.vocab_size, std=0.05, context_length=64)
    reply = chat_reply(model, TOKENIZER, talk(0), SamplingParams(seed=1, max_tokens=500))
    n_prompt = len(render(TOKENIZER, talk(0), add_generation_prompt=True).ids)
    assert reply.finish_reason == "stop" or reply.n_tokens == 64 - n_prompt + 1


def test_a_stream_that_is_closed_early_computes_nothing_more(monkeypatch):
    model = random_model(vocab_size=TOKENIZER.vocab_size, std=0.05, context_length=128)
    calls, step = [], ModelStep.__call__
    monkeypatch.setattr(ModelStep, "__call__", lambda *arguments: calls.append(1) or step(*arguments))
    pieces = stream(model, TOKENIZER, "Once", max_tokens=10_000, seed=1)
    assert not calls  # nothing is computed before it is asked for
    next(pieces)
    n_calls = len(calls)
    pieces.close()
    assert list(pieces) == []
    assert 0 < len(calls) == n_calls < 20


@pytest.mark.parametrize("message", [{}, {"content": "Hello"}, {"role": "robot", "content": "Hello"}, {"role": "user"}])
def test_what_is_no_message_is_an_error_in_words(message):
    with pytest.raises(DataError, match="message 0 of 1"):
        chat_reply(MODEL, TOKENIZER, [message], SamplingParams())


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("draft", [None, "ngrams", 1])
def test_constrained_texts_of_the_engine_are_what_they_must_be(draft, monkeypatch):
    monkeypatch.setattr("groundup.generation.speculative.Speculation._n_guesses", lambda self, text, n: 3)
    model = random_model(vocab_size=TOKENIZER.vocab_size, std=0.05, context_length=256)
    kinds = [
        Constraint.json_schema(SCHEMA),
        Constraint.regex("[a-c]{2,9}!"),
        Constraint.choices(["yes", "no", "naïve"]),
    ]
    requests = [
        Request(TOKENIZER.encode("Once"), SamplingParams(max_tokens=200, seed=seed, constraint=kind, temperature=1.5))
        for seed in range(3)
        for kind in kinds
    ]
    results = [texts[0] for texts in Engine(model, TOKENIZER, slots=4, draft=draft).run(requests)]
    for place, result in enumerate(results):
        assert result.finish_reason == "stop"
        if place % 3 == 0:
            jsonschema.validate(json.loads(result.text), SCHEMA)
        elif place % 3 == 1:
            assert re.fullmatch("[a-c]{2,9}!", result.text)
        else:
            assert result.text in ("yes", "no", "naïve")
    plain = Engine(model, TOKENIZER).run([Request(one.ids, one.params) for one in requests])
    if draft != 1:  # guesses that are drawn give the same law, not the same sample
        assert [texts[0].text for texts in plain] == [result.text for result in results]


class Scripted:
    """An engine whose answers are written down, a letter at a time."""

    def __init__(self, *answers):
        self.model, self.answers, self.asked = MODEL, [*answers], []

    def stream(self, request):
        self.asked.append(request.ids)
        yield from (Chunk(0, letter) for letter in self.answers.pop(0))

    def run(self, requests):
        self.asked += [request.ids for request in requests]
        return [[Generation(text=self.answers.pop(0))] for _ in requests]


def test_a_conversation_runs_the_calculator_once(monkeypatch):
    question = {"role": "user", "content": "3*4?"}
    call = write_call("3 * 4")
    params = SamplingParams(max_tokens=8)
    model = random_model(vocab_size=TOKENIZER.vocab_size, context_length=512)
    engine = Scripted(call, "It is 12.")
    engine.model = model
    pieces = [*stream_chat(model, TOKENIZER, [question], params, engine=engine)]
    assert pieces == ["[3 * 4 = 12] ", *"It is 12."]
    turns = [question, {"role": "assistant", "content": call}, {"role": "tool", "content": "12"}]
    assert engine.asked[1] == render(TOKENIZER, turns, add_generation_prompt=True).ids
    whole = Scripted(call, "It is 12.")
    monkeypatch.setattr("groundup.generation.text.Engine", lambda *_, **options: whole)
    assert chat_reply(model, TOKENIZER, [question], params).text == "[3 * 4 = 12] It is 12."
    assert whole.asked == engine.asked
    for answer in ("It is 12.", '<tool>{"name": "other"}</tool>', "<to", "", "a <tool>"):
        engine = Scripted(answer)
        assert "".join(stream_chat(model, TOKENIZER, [question], params, engine=engine)) == answer
        assert engine.answers == []
